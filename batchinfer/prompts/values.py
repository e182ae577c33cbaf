"""Cells of Arrow columns as checked Python values; a cell that cannot be a prompt is a RowRejected in its place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from batchinfer.errors import RowRejected
from batchinfer.prompts.sandbox import MAX_PROMPT_CHARS

#: role, content and whatever else the column's struct has (tool calls are nested), as transformers takes it.
Message = dict[str, Any]
In = TypeVar("In")
Out = TypeVar("Out")


def cells(rows: pa.Table, name: str) -> list[object]:
    """The column's values as Python objects; a text that is not UTF-8 becomes RowRejected("bad_text") in its row."""
    column = rows.column(name)
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(scalar, name) for scalar in column]
    return values


def each(values: Sequence[In | RowRejected], make: Callable[[In], Out]) -> list[Out | RowRejected]:
    """``make`` of every value; a rejection, found or raised, stands in its row's place."""
    made: list[Out | RowRejected] = []
    for value in values:
        try:
            made.append(value if isinstance(value, RowRejected) else make(value))
        except RowRejected as rejected:
            made.append(rejected)
    return made


def accepted(value: Out | RowRejected) -> Out:
    """The value, or its rejection raised."""
    if isinstance(value, RowRejected):
        raise value
    return value


def text_of(value: object) -> str:
    """A prompt's text. Raises RowRejected: null_prompt, empty_prompt (blank counts), too_long, bad_text."""
    if value is None:
        raise RowRejected("null_prompt", "the prompt is null")
    if not isinstance(value, str):
        raise RowRejected("bad_text", f"expected text, got {type(value).__name__}")
    if len(value) > MAX_PROMPT_CHARS:
        raise RowRejected("too_long", f"the prompt has {len(value):,} characters, above {MAX_PROMPT_CHARS:,}")
    if not value or value.isspace():
        raise RowRejected("empty_prompt", "the prompt is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected("bad_text", f"the text is not valid Unicode at character {error.start}") from None
    return value


def messages_of(value: object) -> list[Message]:
    """A conversation; fields beside role and content go on to the chat template, null ones left out.

    Raises RowRejected: null_prompt, empty_prompt (no message says anything), bad_messages. Only a message with tool
    calls may lack content.
    """
    if value is None:
        raise RowRejected("null_prompt", "the messages are null")
    messages: list[Message] = []
    is_blank = True
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(item, dict):
            raise RowRejected("bad_messages", f"message {index} is null")
        message = {name: field for name, field in item.items() if field is not None}
        if not message.get("role"):
            raise RowRejected("bad_messages", f"message {index} has no role")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise RowRejected("bad_messages", f"message {index} has no content")
        is_blank = is_blank and (not isinstance(content, str) or not content or content.isspace())
        messages.append(message)
    if is_blank:
        raise RowRejected("empty_prompt", "no message says anything" if messages else "there are no messages")
    return messages


def token_ids_of(value: object) -> list[int]:
    """Token ids as they are. Raises RowRejected: null_prompt, empty_prompt, bad_token_ids."""
    if value is None:
        raise RowRejected("null_prompt", "the token ids are null")
    if not isinstance(value, list) or not value:
        raise RowRejected("empty_prompt", "there are no token ids")
    if None in value:
        raise RowRejected("bad_token_ids", f"token id {value.index(None)} is null")
    return value


def override_of(value: object) -> Mapping[str, object] | None:
    """A row's sampling struct; None = the job's own sampling."""
    return value if isinstance(value, dict) else None


def _cell(scalar: "pa.Scalar[pa.DataType]", name: str) -> object:
    try:
        value: object = scalar.as_py()
    except UnicodeDecodeError:
        return RowRejected("bad_text", f"column {name!r} holds bytes that are not UTF-8")
    return value
