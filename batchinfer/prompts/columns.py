"""Which columns a job's prompts read, and whether their Arrow types fit. Needs no tokenizer and no rows."""

import difflib
from collections.abc import Iterable

import pyarrow as pa
from pyarrow import types

from batchinfer.errors import InputError
from batchinfer.prompts.request import METHOD_COLUMN, URL_COLUMN
from batchinfer.prompts.sampling_template import SamplingTemplate
from batchinfer.prompts.template import RowTemplate
from batchinfer.spec import PromptSpec, SamplingSpec

_MESSAGES_TYPE = "list<struct<role: string, content: string>>"
_INTEGER, _NUMBER, _BOOL, _TEXTS, _INTEGERS = "integer", "number", "bool", "list<string>", "list<integer>"
_TEXT = "string"
#: Every field of SamplingSpec, with the type its override needs. An integer may arrive as a float: that is what
#: pandas makes of an integer column with nulls.
SAMPLING_TYPES = {
    "max_new_tokens": _INTEGER,
    "min_new_tokens": _INTEGER,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "n": _INTEGER,
    "seed": _INTEGER,
    "stop": _TEXTS,
    "stop_token_ids": _INTEGERS,
    "ignore_eos": _BOOL,
    "logprobs": _INTEGER,
    "choices": _TEXTS,
    "json_schema": _TEXT,
    "regex": _TEXT,
}


#: Ends an error about a chat template; ``prepare`` finds a missing one in the model's files, the renderer all others.
WITHOUT_CHAT_TEMPLATE = (
    "set prompt.chat: false for plain text, or write the whole prompt as prompt.template with chat: false"
)
NO_CHAT_TEMPLATE = f"the job applies a chat template and the model has none; {WITHOUT_CHAT_TEMPLATE}"


def required_columns(prompt: PromptSpec) -> tuple[str, ...]:
    """The columns the reader must deliver, each once. Raises SpecError for a template that does not parse."""
    if prompt.template is not None:
        sources = RowTemplate(prompt.template).columns
    else:
        named = (prompt.text, prompt.messages, prompt.token_ids, prompt.turns, prompt.request)
        sources = tuple(name for name in named if name is not None)
    if prompt.sampling_column is not None:
        sources += (prompt.sampling_column,)
    if prompt.sampling_template is not None:
        sources += SamplingTemplate(prompt.sampling_template).columns
    return tuple(dict.fromkeys(sources))


def columns_to_deliver(prompt: PromptSpec, schemas: Iterable[pa.Schema]) -> tuple[str, ...]:
    """The required columns, and those that a request obeys where any of these schemas has them."""
    columns = required_columns(prompt)
    if prompt.request is not None:
        present = {name for schema in schemas for name in schema.names}
        columns += tuple(name for name in (URL_COLUMN, METHOD_COLUMN) if name in present and name not in columns)
    return columns


def json_text_columns(prompt: PromptSpec) -> tuple[str, ...]:
    """Columns that prompts read as JSON text, so that JSON Lines are to keep them as they are."""
    return () if prompt.request is None else (prompt.request,)


def expected_types(prompt: PromptSpec) -> dict[str, pa.DataType]:
    """The types that columns should have, for inputs that leave a choice: JSON Lines, where each row has its own."""
    text, message = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    sources = (
        (prompt.text, text),
        (prompt.messages, pa.list_(message)),
        (prompt.turns, pa.list_(text)),
        (prompt.token_ids, pa.list_(pa.int64())),
        (prompt.sampling_column, pa.struct([])),
    )
    return {name: type_ for name, type_ in sources if name is not None}


def scores_choices(prompt: PromptSpec, sampling: SamplingSpec, schema: pa.Schema) -> bool:
    """Whether rows of this schema may have choices to score, so that the job adds the column of their scores."""
    if sampling.choices or prompt.sampling_column is None or prompt.sampling_column not in schema.names:
        return bool(sampling.choices)
    overrides = schema.field(prompt.sampling_column).type
    return isinstance(overrides, pa.StructType) and overrides.get_field_index("choices") >= 0


def check_schema(prompt: PromptSpec, sampling: SamplingSpec, schema: pa.Schema, where: str = "the input") -> None:
    """Raise InputError unless every required column is in ``schema`` once and with a type that fits.

    ``where`` names what the schema belongs to, such as a shard's path. Values are not looked at: a bad row in a
    good column becomes a dead letter.
    """
    for name in required_columns(prompt):
        indices = schema.get_all_field_indices(name)
        if not indices:
            close = difflib.get_close_matches(name, schema.names, n=1)
            known = f"did you mean {close[0]!r}? It has" if close else "it has"
            raise InputError(f"{where}: there is no column {name!r}; {known} {', '.join(schema.names) or 'no columns'}")
        if len(indices) > 1:
            raise InputError(f"{where}: the column {name!r} is there {len(indices)} times; rename all but one")
    if prompt.text is not None and not _is_text(schema.field(prompt.text).type):
        raise _wrong_type(where, schema, "prompt.text", prompt.text, "string")
    if prompt.messages is not None and not _is_messages(schema.field(prompt.messages).type):
        raise _wrong_type(where, schema, "prompt.messages", prompt.messages, _MESSAGES_TYPE)
    if prompt.token_ids is not None and not _fits(schema.field(prompt.token_ids).type, _INTEGERS):
        raise _wrong_type(where, schema, "prompt.token_ids", prompt.token_ids, _INTEGERS)
    if prompt.turns is not None and not _fits(schema.field(prompt.turns).type, _TEXTS):
        raise _wrong_type(where, schema, "prompt.turns", prompt.turns, _TEXTS)
    if prompt.request is not None and not _is_request(schema.field(prompt.request).type):
        raise _wrong_type(where, schema, "prompt.request", prompt.request, "string (JSON text) or a struct")
    if prompt.sampling_column is not None:
        _check_sampling_struct(sampling, schema, prompt.sampling_column, where)


def _check_sampling_struct(sampling: SamplingSpec, schema: pa.Schema, name: str, where: str) -> None:
    struct = schema.field(name).type
    if types.is_null(struct):
        return
    if not isinstance(struct, pa.StructType):
        raise _wrong_type(where, schema, "prompt.sampling_column", name, "a struct of sampling fields")
    for field in (struct.field(index) for index in range(struct.num_fields)):
        if field.name not in SAMPLING_TYPES:
            close = difflib.get_close_matches(field.name, SAMPLING_TYPES, n=1)
            way_out = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(SAMPLING_TYPES)}"
            raise InputError(f"{where}: column {name!r} has the unknown field {field.name!r}; {way_out}")
        if not _fits(field.type, SAMPLING_TYPES[field.name]):
            expected = SAMPLING_TYPES[field.name]
            raise InputError(f"{where}: field {field.name!r} of column {name!r} is {field.type}, expected {expected}")
        if field.name == "logprobs" and sampling.logprobs is None:
            raise InputError(
                f"{where}: column {name!r} overrides logprobs, which the job does not write; "
                "set sampling.logprobs: 0 (or more) in the job file, or drop the field"
            )


def _wrong_type(where: str, schema: pa.Schema, key: str, name: str, expected: str) -> InputError:
    found = schema.field(name).type
    return InputError(
        f"{where}: column {name!r} is {found}, but {key} needs {expected}; name another column or convert this one"
    )


def _fits(found: pa.DataType, expected: str) -> bool:
    if types.is_null(found):
        return True
    if expected == _INTEGER:
        return types.is_integer(found) or types.is_floating(found)
    if expected == _NUMBER:
        return types.is_integer(found) or types.is_floating(found)
    if expected == _BOOL:
        return types.is_boolean(found)
    if expected == _TEXT:
        return _is_text(found)
    item = _item_type(found)
    if item is None:
        return False
    if types.is_null(item):
        return True
    return _is_text(item) if expected == _TEXTS else types.is_integer(item)


def _is_text(found: pa.DataType) -> bool:
    if isinstance(found, pa.DictionaryType):
        found = found.value_type
    return bool(
        types.is_string(found) or types.is_large_string(found) or types.is_string_view(found) or types.is_null(found)
    )


def _is_request(found: pa.DataType) -> bool:
    return isinstance(found, pa.StructType) or _is_text(found)


def _is_messages(found: pa.DataType) -> bool:
    if types.is_null(found):
        return True
    item = _item_type(found)
    if not isinstance(item, pa.StructType):
        return False
    fields = {item.field(index).name: item.field(index).type for index in range(item.num_fields)}
    return all(name in fields and _is_text(fields[name]) for name in ("role", "content"))


def _item_type(found: pa.DataType) -> pa.DataType | None:
    """What a list column of any layout is a list of; None for other columns."""
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    return found.value_type if isinstance(found, lists) else None
