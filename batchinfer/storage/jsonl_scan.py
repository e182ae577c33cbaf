"""One look at every line of a JSON Lines shard: its identity, where its rows are, and what types they have.

A Parquet file says all this in its footer; here the file has to be read, once, in pieces.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Collection
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from batchinfer.errors import RowRejected, ShardCorrupt
from batchinfer.records import LineBlocks, LineCompression
from batchinfer.storage.footer import ShardDigest
from batchinfer.storage.jsonl_stream import FileBytes, LineBytes, blocks
from batchinfer.storage.jsonl_types import Survey
from batchinfer.storage.jsonl_values import may_be_sound, parse_in_bulk, parse_line, rows_of
from batchinfer.storage.location import Location

#: Blocks of one shard that are parsed or wait for it; with what is fetched, the memory a scan takes.
_BLOCKS_IN_FLIGHT: Final = 4


@dataclass(frozen=True, slots=True)
class ScannedLines:
    """What a JSON Lines shard holds. ``rows`` is the survey of its rows, each an object."""

    shard_id: str
    num_rows: int
    num_rejected: int
    lines: LineBlocks
    rows: Survey


@dataclass(frozen=True, slots=True)
class _ScannedBlock:
    num_lines: int
    num_rows: int
    num_rejected: int
    rows: Survey


def scan_lines(
    location: Location,
    path: str,
    size_bytes: int,
    compression: LineCompression | None,
    as_texts: Collection[str],
    parsers: Executor,
) -> ScannedLines:
    """Read a shard to its end. ``as_texts`` are columns whose values are kept as JSON texts, whatever they are.

    Raises ShardCorrupt when the file cannot be decompressed, ends before ``size_bytes`` or has no JSON object in it;
    what the location raises.
    """
    digest = ShardDigest(path, size_bytes)
    source = FileBytes(location, size_bytes, digest.update)
    scan = _Scan(as_texts)
    in_flight: deque[tuple[int, bytes, Future[_ScannedBlock]]] = deque()
    stream = LineBytes(source, compression)
    for first_byte, block in blocks(stream):
        in_flight.append((first_byte, block, parsers.submit(_scan_block, block, scan.known_types, tuple(as_texts))))
        # The first block's types are what the others are read with.
        while len(in_flight) >= (_BLOCKS_IN_FLIGHT if scan.num_blocks else 1):
            scan.add(*in_flight.popleft())
    while in_flight:
        scan.add(*in_flight.popleft())
    # A decompressor may leave the file's last bytes alone; they are part of its identity.
    while source.read(size_bytes):
        pass
    if scan.num_rows and scan.num_rejected == scan.num_rows:
        raise ShardCorrupt(
            f"none of its {scan.num_rows} lines is a JSON object; JSON Lines has one a line: is it a JSON array, or "
            "another format? Convert it (jq -c '.[]' makes lines of an array)"
        )
    return ScannedLines(digest.shard_id, scan.num_rows, scan.num_rejected, scan.lines(compression), scan.rows)


class _Scan:
    """What is known of a shard after its first blocks."""

    def __init__(self, as_texts: Collection[str]) -> None:
        self.rows = Survey()
        self.num_rows = 0
        self.num_rejected = 0
        #: None = blocks are parsed one line at a time.
        self.known_types: pa.Schema | None = None
        self._as_texts = as_texts
        self._first_rows = array("q", [0])
        self._first_lines = array("q", [1])
        self._first_bytes = array("q")
        self._end_byte = 0
        self._checksums = array("L")
        self._are_sound = bytearray()

    @property
    def num_blocks(self) -> int:
        return len(self._checksums)

    def add(self, first_byte: int, block: bytes, scanned: "Future[_ScannedBlock]") -> None:
        """Take in the next block, which may still have to be waited for."""
        found = scanned.result()
        self.rows.merge(found.rows)
        self.num_rows += found.num_rows
        self.num_rejected += found.num_rejected
        self._first_rows.append(self.num_rows)
        self._first_lines.append(self._first_lines[-1] + found.num_lines)
        self._first_bytes.append(first_byte)
        self._end_byte = first_byte + len(block)
        self._checksums.append(zlib.crc32(block))
        self._are_sound.append(not found.num_rejected)
        if not self._as_texts:
            self.known_types = _settled_types(self.rows)

    def lines(self, compression: LineCompression | None) -> LineBlocks:
        return LineBlocks(
            first_rows=self._first_rows,
            first_lines=self._first_lines,
            first_bytes=array("q", [*self._first_bytes, self._end_byte]),
            checksums=self._checksums,
            are_sound=bytes(self._are_sound),
            compression=compression,
        )


def _settled_types(rows: Survey) -> pa.Schema | None:
    """The columns so far, when each has a type: a block that fits it has nothing new but the width of its integers."""
    fields = [(name, column.arrow_type()) for name, column in rows.fields.items()]
    known = [(name, type_) for name, type_ in fields if type_ is not None]
    return pa.schema(known) if known and len(known) == len(fields) else None


def _scan_block(block: bytes, known_types: pa.Schema | None, as_texts: Collection[str]) -> _ScannedBlock:
    numbered = rows_of(block)
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    rows = [row for _, row in numbered]
    survey = Survey()
    if known_types is not None and may_be_sound(rows):
        table = parse_in_bulk(rows, known_types, "error")
        if table is not None and _observe_table(survey, table):
            return _ScannedBlock(num_lines, len(rows), 0, survey)
        survey = Survey()
    num_rejected = 0
    for row in rows:
        try:
            survey.observe(parse_line(row) if not as_texts else _with_texts(parse_line(row), as_texts))
        except RowRejected:
            num_rejected += 1
    return _ScannedBlock(num_lines, len(rows), num_rejected, survey)


def _with_texts(row: dict[str, Any], as_texts: Collection[str]) -> dict[str, Any]:
    """A row as it is read: these columns are strings, whatever they hold."""
    return row | {name: "" for name in as_texts if row.get(name) is not None}


def _observe_table(survey: Survey, table: pa.Table) -> bool:
    columns = zip(table.column_names, table.columns, strict=True)
    return all(survey.field(name).observe_array(chunk) for name, column in columns for chunk in column.chunks)
