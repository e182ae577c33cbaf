"""Rows of work units out of JSON Lines shards.

The planner has noted where each block of lines begins, so a unit costs the bytes of its own blocks; in a compressed
shard, which has to be read from its beginning, a stream once opened is read on.
"""

import zlib
from collections.abc import Callable

import pyarrow as pa

from batchinfer.errors import JobError, RowRejected, ShardCorrupt, StorageUnavailable
from batchinfer.records import LineBlocks, LineCompression, Shard, WorkUnit
from batchinfer.storage.cursors import IdleCursors
from batchinfer.storage.jsonl_stream import FileBytes, LineBytes
from batchinfer.storage.jsonl_values import ParsedLines, parse_lines, rows_of
from batchinfer.storage.location import Location
from batchinfer.storage.reader import UnitRows


class JsonlReader:
    """Reads units of any JSON Lines shards; every table has exactly the columns and types of ``schema``.

    Any number of threads may read at once. What a row becomes never depends on the rows beside it.
    """

    def __init__(self, locate: Callable[[str], Location], schema: pa.Schema, max_idle_cursors: int = 4) -> None:
        """``locate`` turns a shard's uri into its location; keys outside ``schema`` are not read."""
        self._locate = locate
        self._schema = schema
        self._idle: IdleCursors[_Cursor] = IdleCursors(max_idle_cursors)

    def read_unit(self, shard: Shard, unit: WorkUnit) -> UnitRows:
        """The unit's rows up to the first block that is not as it was planned; a line that is no row is rejected.

        May be repeated, in any order of units. Raises StorageUnavailable when the shard cannot be reached.
        """
        if shard.lines is None:
            raise ValueError(f"shard {shard.path} comes without its lines, which only a plan of the input has")
        wanted = shard.lines.holding(unit.first_row, unit.num_rows)
        tables: list[pa.Table] = []
        rejected: dict[int, RowRejected] = {}
        num_rows, error = 0, None
        try:
            content = self._bytes(shard, unit, wanted)
            for number in range(len(wanted)):
                parsed = self._rows(wanted, number, content, unit)
                rejected |= {num_rows + position: reason for position, reason in parsed.rejected.items()}
                num_rows += parsed.table.num_rows
                tables.append(parsed.table)
        except ShardCorrupt as damage:
            error = ShardCorrupt(f"shard {shard.path}: {damage}")
        except JobError as failure:
            # It was there when the plan was made: as with Parquet, a mount that this machine lacks must not turn rows
            # into dead letters, nor end the job for the machines that have it.
            raise StorageUnavailable(f"shard {shard.path} was planned but cannot be read here: {failure}") from failure
        table = pa.concat_tables(tables) if tables else self._schema.empty_table()
        return UnitRows(table, unit.num_rows - num_rows, error, rejected)

    def close(self) -> None:
        """Close the idle cursors; the reader may be used again."""
        self._idle.close()

    def _bytes(self, shard: Shard, unit: WorkUnit, wanted: LineBlocks) -> bytes:
        """Those of the blocks; fewer where the shard ends early."""
        first, end = wanted.first_bytes[0], wanted.first_bytes[-1]
        if wanted.compression is None:
            return self._locate(shard.uri).read_range(first, end - first)
        cursor = self._idle.take(shard.shard_id, first) or _Cursor(
            shard.shard_id, FileBytes(self._locate(shard.uri), shard.size_bytes), wanted.compression
        )
        try:
            content = cursor.read(wanted)
        except BaseException:
            cursor.close()
            raise
        cursor.at_end = unit.first_row + unit.num_rows >= shard.num_rows
        self._idle.keep(cursor)
        return content

    def _rows(self, wanted: LineBlocks, number: int, content: bytes, unit: WorkUnit) -> ParsedLines:
        """The unit's rows in one block. Raises ShardCorrupt when the block's bytes are others than the planned ones."""
        start, end = (wanted.first_bytes[k] - wanted.first_bytes[0] for k in (number, number + 1))
        block = content[start:end]
        if len(block) < end - start or zlib.crc32(block) != wanted.checksums[number]:
            raise ShardCorrupt(
                f"its lines from {wanted.first_lines[number]} on are not those that were planned: it was changed since"
            )
        first_row = wanted.first_rows[number]
        skipped = max(0, unit.first_row - first_row)
        numbered = rows_of(block)[skipped : unit.first_row + unit.num_rows - first_row]
        parsed = parse_lines([row for _, row in numbered], self._schema, bool(wanted.are_sound[number]))
        rejected = {
            position: _on_line(wanted.first_lines[number] + numbered[position][0], reason)
            for position, reason in parsed.rejected.items()
        }
        return ParsedLines(parsed.table, rejected)


class _Cursor:
    """A compressed shard that is being read from its beginning."""

    def __init__(self, shard_id: str, source: FileBytes, compression: LineCompression) -> None:
        self.shard_id = shard_id
        self.at_end = False
        #: First byte that can still be read.
        self.position = 0
        self._source = source
        self._lines = LineBytes(source, compression)
        #: From ``position`` to where the stream is.
        self._kept = b""

    def read(self, blocks: LineBlocks) -> bytes:
        """What the shard decompresses to where these blocks are, fewer bytes where it ends early.

        They must not lie behind ``position``. The last block can be read again: the next unit may begin in it.
        """
        first, end, last = blocks.first_bytes[0], blocks.first_bytes[-1], blocks.first_bytes[-2]
        if first < self._lines.position:
            content = self._kept[first - self.position :] + self._lines.read(end - self._lines.position)
        else:
            self._lines.skip_to(first)
            content = self._lines.read(end - first)
        self.position, self._kept = last, content[last - first :]
        return content

    def close(self) -> None:
        self._source.close()


def _on_line(number: int, reason: RowRejected) -> RowRejected:
    return RowRejected(reason.error_type, f"line {number}: {reason.error}")
