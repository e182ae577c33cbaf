"""JSON lines to values: strictly, each line by itself, and in bulk where Arrow's own parser is known to agree.

Strict means what RFC 8259 leaves open is refused rather than guessed: a key that is there twice, NaN and Infinity,
numbers beyond a float64, unpaired surrogates, bytes that are no UTF-8. Arrow's parser takes several of these, so it
is only asked for lines that have been looked at.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from typing import IO, Any, Final, Literal, NoReturn, cast

import pyarrow as pa
import pyarrow.json as arrow_json

from batchinfer.errors import RowRejected

#: Dead letters: a line that is no JSON object, and a value that is not of its column's type.
BAD_JSON: Final = "bad_json"
BAD_VALUE: Final = "bad_value"
#: In a field's metadata: its strings are JSON texts. The value is ``ASKED`` where the job wants them as they are, else
#: the kinds of values that have no common type, in words.
JSON_TEXT: Final = b"batchinfer.json_text"
ASKED: Final = b"asked"

#: White space of JSON; others, such as a form feed, make a line no JSON.
WHITE_SPACE: Final = b" \t\r\n"
#: Lists and objects within each other: Python's parser ends at about a thousand, Arrow's with its process's stack, but
#: for what is not of the types it is given.
_MAX_DEPTH: Final = 100
_SHOWN_CHARS: Final = 60


@dataclass(frozen=True, slots=True)
class ParsedLines:
    """A row for each line, nulls for those in ``rejected``: positions among the lines, and why."""

    table: pa.Table
    rejected: Mapping[int, RowRejected]


def parse_line(line: bytes) -> dict[str, Any]:
    """The object that a line is. Raises RowRejected (``bad_json``), with what is wrong and where in the line."""
    try:
        value = json.loads(
            line.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise RowRejected(BAD_JSON, f"byte {error.start + 1} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowRejected(BAD_JSON, f"{error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise RowRejected(BAD_JSON, f"nested deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:
        raise RowRejected(BAD_JSON, str(error)) from error
    if not isinstance(value, dict):
        raise RowRejected(BAD_JSON, f"is {_shown(value)}, not an object")
    if _num_openings(line) > _MAX_DEPTH and _is_deep(value):
        raise RowRejected(BAD_JSON, f"nested deeper than {_MAX_DEPTH} levels")
    if (b"\\ud" in line or b"\\uD" in line) and _has_lone_surrogate(value):
        raise RowRejected(BAD_JSON, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def parse_lines(lines: Sequence[bytes], schema: pa.Schema, are_sound: bool) -> ParsedLines:
    """The rows that ``lines`` are, with exactly the columns and types of ``schema``; keys beside it are left out.

    ``are_sound``: each line is known to be one that ``parse_line`` takes.
    """
    if are_sound and not json_text_columns(schema):
        table = parse_in_bulk(lines, schema, "ignore")
        if table is not None:
            return ParsedLines(table, {})
    rejected: dict[int, RowRejected] = {}
    rows: list[Mapping[str, Any]] = []
    for position, line in enumerate(lines):
        try:
            rows.append(parse_line(line))
        except RowRejected as error:
            rejected[position] = error
            rows.append({})
    columns = [_column(rows, field, rejected) for field in schema]
    return ParsedLines(pa.Table.from_arrays(columns, schema=schema), rejected)


def parse_in_bulk(lines: Sequence[bytes], schema: pa.Schema, unexpected: Literal["ignore", "error"]) -> pa.Table | None:
    """What Arrow's parser makes of the lines with these types; None when it cannot, for a line's or a value's sake.

    With ``error`` no line holds a key that the schema lacks, at any depth. The lines must be ``may_be_sound``.
    """
    if not lines:
        return schema.empty_table()
    content = b"\n".join(lines)
    try:
        table = arrow_json.read_json(
            cast("IO[bytes]", pa.BufferReader(content)),
            read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
        )
    except (pa.ArrowException, OverflowError):
        return None
    # Several objects on one line are several rows to Arrow.
    return table.select(schema.names).cast(schema) if table.num_rows == len(lines) else None


def may_be_sound(lines: Sequence[bytes]) -> bool:
    """Whether what Arrow's parser says of these lines is true: where it sees one row a line, each is one object.

    A line break inside an object would be followed by ``,`` or a closing bracket, so an object cannot span lines that
    all begin with ``{`` and end with ``}``.
    """
    return all(line[:1] == b"{" and line[-1:] == b"}" for line in lines) and all(map(_is_utf8, lines))


def rows_of(block: bytes) -> list[tuple[int, bytes]]:
    """The lines of a block that are rows, stripped, with their numbers from 0: blank lines are none."""
    lines = block.split(b"\n")
    return [(number, row) for number, line in enumerate(lines) if (row := line.strip(WHITE_SPACE))]


def json_text_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Columns of a schema whose strings are JSON texts."""
    return tuple(field.name for field in schema if JSON_TEXT in (field.metadata or {}))


def _column(
    rows: Sequence[Mapping[str, Any]], field: "pa.Field[pa.DataType]", rejected: dict[int, RowRejected]
) -> "pa.Array[Any]":
    values = [row.get(field.name) for row in rows]
    if JSON_TEXT in (field.metadata or {}):
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError):
        for position, value in enumerate(values):
            if not _fits(value, field.type):
                why = f"column {field.name!r} is {_shown(value)}, expected {field.type}"
                rejected.setdefault(position, RowRejected(BAD_VALUE, why))
                values[position] = None
        return pa.array(values, field.type)


def _fits(value: object, type_: pa.DataType) -> bool:
    try:
        pa.array([value], type_)
    except (pa.ArrowException, OverflowError):
        return False
    return True


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON; write null")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"the number {text[:_SHOWN_CHARS]} is beyond a float64")
    return number


def _num_openings(line: bytes) -> int:
    return line.count(b"[") + line.count(b"{")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _has_lone_surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_utf8(line: bytes) -> bool:
    if line.isascii():
        return True
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
