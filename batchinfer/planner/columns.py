"""Which columns are read, and with which types: the schemas of all shards made one."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.errors import InputError
from batchinfer.records import GENERATED_COLUMNS, Shard
from batchinfer.storage.jsonl_values import ASKED, JSON_TEXT


@dataclass(frozen=True, slots=True)
class InputSchema:
    """One of the distinct Arrow schemas of the input, with a shard that has it."""

    schema: pa.Schema
    example: Shard


def refuse_mixed_columns(schemas: Sequence[InputSchema], needed: Collection[str]) -> None:
    """InputError when prompts are made of a column that is JSON text only because its values have no common type."""
    for each in schemas:
        for name in sorted(set(needed) & set(each.schema.names)):
            mixture = (each.schema.field(name).metadata or {}).get(JSON_TEXT, ASKED)
            if mixture != ASKED:
                raise InputError(
                    f"column {name!r}, of which prompts are made, holds {mixture.decode()} in the JSON Lines input; "
                    "write all its values as one type"
                )


def columns_to_read(
    schemas: Sequence[InputSchema],
    needed: Collection[str],
    passed_through: Sequence[str] | None,
    added: Collection[str] = (),
) -> tuple[pa.Schema, tuple[str, ...]]:
    """The one schema all shards are read with, and the columns passed through to the output.

    ``needed`` are the columns prompts are made of; ``passed_through`` None means all; ``added`` are columns that not
    every job adds but this one does, so that none of their names may be passed through. Across shards a column may
    be null-typed, or large_string here and string there; any other difference of a column that is read raises
    InputError naming both shards, as does a missing column. Without any row there is nothing to check and
    the schema is empty.
    """
    if not schemas:
        return pa.schema([]), ()
    passed = tuple(schemas[0].schema.names if passed_through is None else passed_through)
    clash = sorted(set(passed) & set(added))
    if clash:
        raise InputError(
            f"this job adds the columns {', '.join(clash)} itself, and the input has them too; rename them, or leave "
            "them out of output.columns"
        )
    wanted = [*passed, *(name for name in sorted(needed) if name not in passed)]
    # A table without columns has no rows either.
    wanted = wanted or schemas[0].schema.names[:1]
    for each in schemas:
        _check_columns(each, wanted)
        if passed_through is None:
            _check_all_columns(schemas[0], each)
    return pa.schema([_common_field(name, schemas) for name in wanted]), passed


def _check_columns(each: InputSchema, wanted: Sequence[str]) -> None:
    names = each.schema.names
    for name in wanted:
        num_found = names.count(name)
        if num_found == 1:
            continue
        if num_found:
            raise InputError(f"shard {each.example.path} has {num_found} columns named {name!r}; rename all but one")
        near = difflib.get_close_matches(name, names, n=1)
        known = f"did you mean {near[0]!r}? It has:" if near else "it has:"
        raise InputError(f"shard {each.example.path} has no column {name!r}; {known} {', '.join(names)}")


def _check_all_columns(first: InputSchema, each: InputSchema) -> None:
    clash = sorted(set(each.schema.names) & set(GENERATED_COLUMNS))
    if clash:
        raise InputError(
            f"shard {each.example.path} has columns that the job adds itself: {', '.join(clash)}; rename them, or list "
            "the columns to pass through in output.columns"
        )
    extra = sorted(set(each.schema.names) - set(first.schema.names))
    if extra:
        raise InputError(
            f"shard {each.example.path} has columns that shard {first.example.path} lacks: {', '.join(extra)}; list "
            "the columns to pass through in output.columns"
        )


def _common_field(name: str, schemas: Sequence[InputSchema]) -> "pa.Field[pa.DataType]":
    settled, settled_by = schemas[0].schema.field(name).type, schemas[0]
    for each in schemas[1:]:
        found = each.schema.field(name).type
        if pa.types.is_null(settled):
            settled, settled_by = found, each
        elif not pa.types.is_null(found) and plain_type(found) != plain_type(settled):
            raise InputError(
                f"column {name!r} is {settled} in shard {settled_by.example.path} but {found} in shard "
                f"{each.example.path}; write both with one type, or leave it out of output.columns"
            )
    text = (settled_by.schema.field(name).metadata or {}).get(JSON_TEXT)
    return pa.field(name, settled, metadata=None if text is None else {JSON_TEXT: text})


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type without the width of its offsets: string and large_string hold the same values."""
    if pa.types.is_large_string(type_):
        return pa.string()
    if pa.types.is_large_binary(type_):
        return pa.binary()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(pa.field("element", plain_type(type_.value_type)))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in type_])
    return type_
