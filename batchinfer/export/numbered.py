"""Completions as numbered files, Parquet or JSON lines, with all their columns; memory holds one file's rows."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.export.source import Source
from batchinfer.export.target import Target

NumberedFormat = Literal["parquet", "jsonl"]

#: A file is closed once it holds this much, uncompressed.
MAX_FILE_BYTES = 256 << 20


def write_numbered(source: Source, target: Target, format_: NumberedFormat, *, ordered: bool) -> int:
    """Copy every committed completion to ``part-<number>.<format>``; returns how many there are."""
    num_completions = 0
    for tables in _files(source.tables(source.units(ordered=ordered))):
        table = pa.concat_tables(tables, promote_options="permissive")
        with target.file(f"part-{target.num_files:05d}.{format_}") as file:
            if format_ == "parquet":
                pq.write_table(table, file, compression="zstd")
            else:
                _write_lines(table, file)
        num_completions += table.num_rows
    return num_completions


def is_numbered(name: str, format_: str) -> bool:
    """Whether a file of this name is one of an export in this format."""
    return re.fullmatch(rf"part-\d+\.{format_}", name) is not None


def _files(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables gathered to files of about ``MAX_FILE_BYTES``; one empty file where there is nothing, for its columns."""
    gathered: list[pa.Table] = []
    empty: pa.Table | None = None
    num_bytes = num_files = 0
    for table in tables:
        if not table.num_rows:
            empty = table
            continue
        gathered.append(table)
        num_bytes += table.nbytes
        if num_bytes >= MAX_FILE_BYTES:
            yield gathered
            gathered, num_bytes, num_files = [], 0, num_files + 1
    if gathered:
        yield gathered
    elif not num_files and empty is not None:
        yield [empty]


def _write_lines(table: pa.Table, file: BinaryIO) -> None:
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n")


def _plain(value: object) -> object:
    """What JSON has no word for: bytes as base64, moments as ISO 8601, decimals as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a column holds {type(value).__name__}, which JSON lines cannot; export it as parquet")
