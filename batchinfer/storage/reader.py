"""Rows of work units out of Parquet shards, in bounded memory whatever a shard's size.

A shard may be one row group of a million rows and a unit a thousand of them, so a stream once opened is kept
and read on: unit k+1 costs its own rows, not those before it. Another input format is another class with
``read_unit`` and ``close``; ``shard_reader`` chooses.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import JobError, RowRejected, ShardCorrupt, StorageUnavailable
from batchinfer.records import Shard, WorkUnit
from batchinfer.storage.cursors import IdleCursors
from batchinfer.storage.location import Location

#: Rows decoded at once: what a cursor holds beyond the unit asked for.
_ROWS_PER_BATCH = 1024
#: Bytes fetched at once per column.
_BUFFER_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UnitRows:
    """What could be read of a unit: its first ``table.num_rows`` rows; ``num_missing`` more could not be.

    ``error`` says why, and is None exactly when nothing is missing.
    """

    table: pa.Table
    num_missing: int
    error: ShardCorrupt | None
    #: Rows of the table, by their offset in the unit, that are none, and why; what they hold means nothing.
    rejected: Mapping[int, RowRejected] = field(default_factory=dict)


class ParquetReader:
    """Reads units of any shards; every table has exactly the columns and types of ``schema``.

    Several threads may read at once, each on a cursor of its own; the next unit takes the idle one closest before its
    first row.
    """

    def __init__(self, locate: Callable[[str], Location], schema: pa.Schema, max_idle_cursors: int = 4) -> None:
        """``locate`` turns a shard's uri into its location; shard columns outside ``schema`` are not read."""
        self._locate = locate
        self._schema = schema
        self._idle: IdleCursors[_Cursor] = IdleCursors(max_idle_cursors)
        #: (shard id, row group) -> (first row that cannot be read, why); found once, not for each unit behind it.
        self._damage: dict[tuple[str, int], tuple[int, str]] = {}

    def read_unit(self, shard: Shard, unit: WorkUnit) -> UnitRows:
        """The unit's rows up to the first damaged one.

        May be repeated, in any order of units; ascending order is the fast one. Raises StorageUnavailable when
        the shard cannot be reached (not there on this machine, or transient errors outlast their retries).
        """
        cursor = self._idle.take(shard.shard_id, unit.first_row)
        try:
            cursor = cursor or _Cursor.open(shard, self._locate(shard.uri), self._schema.names)
            batches = cursor.read(unit.first_row, unit.num_rows, self._damage)
            error = None
        except _Damaged as damaged:
            if cursor is not None:
                cursor.close()
                cursor = None
            batches, error = damaged.batches, ShardCorrupt(f"shard {shard.path}: {damaged.cause}")
        except BaseException as failure:
            if cursor is not None:
                cursor.close()
            if isinstance(failure, JobError):
                # It was there when the plan was made: a mount that this machine lacks must not turn rows into
                # dead letters, nor end the job for the machines that have it.
                raise StorageUnavailable(
                    f"shard {shard.path} was planned but cannot be read here: {failure}"
                ) from failure
            raise
        if cursor is not None:
            self._idle.keep(cursor)
        table = pa.Table.from_batches([_with_schema(batch, self._schema) for batch in batches], schema=self._schema)
        return UnitRows(table, unit.num_rows - table.num_rows, error)

    def close(self) -> None:
        """Close the idle cursors; the reader may be used again."""
        self._idle.close()


class _Damaged(Exception):
    """Reading stopped at damage: what was read before it, and its cause."""

    def __init__(self, batches: list[pa.RecordBatch], cause: str) -> None:
        super().__init__(cause)
        self.batches = batches
        self.cause = cause


@dataclass(slots=True)
class _Cursor:
    """One open shard and a position in it that only moves forward. Used by one thread at a time."""

    shard: Shard
    columns: list[str]
    source: "pa.NativeFile | BinaryIO"
    file: pq.ParquetFile
    #: First row of each row group, and the number of rows behind the last.
    group_starts: list[int]
    next_row: int = 0
    _group: int = -1
    _batches: Iterator[pa.RecordBatch] = field(default_factory=lambda: iter(()))
    #: Decoded rows from ``next_row`` on.
    _rest: pa.RecordBatch | None = None

    @classmethod
    def open(cls, shard: Shard, location: Location, columns: list[str]) -> "_Cursor":
        source = location.open_random()
        try:
            file = pq.ParquetFile(
                source,
                # Pre-buffering would hold a whole row group.
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                page_checksum_verification=True,
            )
            num_rows = file.metadata.num_rows
            if num_rows != shard.num_rows:
                raise _Damaged([], f"has {num_rows} rows, was planned with {shard.num_rows}; it was changed since")
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            return cls(shard, columns, source, file, starts)
        except (pa.ArrowException, OSError) as error:
            source.close()
            raise _Damaged([], _cause(error, shard)) from error
        except BaseException:
            source.close()
            raise

    @property
    def shard_id(self) -> str:
        return self.shard.shard_id

    @property
    def position(self) -> int:
        return self.next_row

    @property
    def at_end(self) -> bool:
        return self.next_row >= self.shard.num_rows

    def close(self) -> None:
        with suppress(OSError):
            self.source.close()

    def read(
        self, first_row: int, num_rows: int, damage: dict[tuple[str, int], tuple[int, str]]
    ) -> list[pa.RecordBatch]:
        """Rows ``first_row .. first_row + num_rows - 1`` as stored; _Damaged carries those before damage.

        ``first_row`` must not lie before ``next_row``. After _Damaged the cursor is of no more use.
        """
        wanted: list[pa.RecordBatch] = []
        missing = num_rows
        while missing > 0:
            row = max(first_row, self.next_row)
            group = self._group_of(row)
            known = damage.get((self.shard.shard_id, group))
            if known is not None and row >= known[0]:
                raise _Damaged(wanted, known[1])
            try:
                batch = self._next_batch(group, row, missing)
            except (pa.ArrowException, OSError) as error:
                good, first_bad_row, cause = self._rows_before_damage(group, row, _cause(error, self.shard))
                damage[(self.shard.shard_id, group)] = (first_bad_row, cause)
                wanted += good[:missing]
                if len(good) >= missing:
                    # The damage lies behind this unit, in a batch that reached beyond it.
                    self._group = -1
                    self._rest = None
                    self.next_row = first_row + num_rows
                    return wanted
                raise _Damaged(wanted, cause) from error
            wanted.append(batch)
            missing -= batch.num_rows
        return wanted

    def _next_batch(self, group: int, row: int, max_rows: int) -> pa.RecordBatch:
        """At least one and at most ``max_rows`` rows from ``row`` on, all of one row group."""
        if group != self._group:
            self._start(group)
        while self._rest is None or self.next_row + self._rest.num_rows <= row:
            if self._rest is not None:
                self.next_row += self._rest.num_rows
                self._rest = None
            self._rest = next(self._batches, None)
            if self._rest is None:
                raise pa.ArrowInvalid(f"row group {group} ends at row {self.next_row}, its footer says more")
        skipped = row - self.next_row
        taken = self._rest.slice(skipped, max_rows)
        rest = self._rest.slice(skipped + taken.num_rows)
        self.next_row = row + taken.num_rows
        self._rest = rest if rest.num_rows else None
        return taken

    def _start(self, group: int) -> None:
        self._batches = self.file.iter_batches(
            batch_size=_ROWS_PER_BATCH, row_groups=[group], columns=self.columns, use_threads=False
        )
        self._group, self._rest, self.next_row = group, None, self.group_starts[group]

    def _rows_before_damage(self, group: int, row: int, cause: str) -> tuple[list[pa.RecordBatch], int, str]:
        """Rows ``row ..`` that can be read one by one: at most a batch of them, for the batch failed as a whole.

        Returns them as batches of one row, the row that cannot be read, and why. Decodes the row group from its
        start, once in a reader's life.
        """
        good: list[pa.RecordBatch] = []
        position = self.group_starts[group]
        try:
            for batch in self.file.iter_batches(
                batch_size=1, row_groups=[group], columns=self.columns, use_threads=False
            ):
                if position >= row:
                    good.append(batch)
                position += batch.num_rows
                if len(good) > _ROWS_PER_BATCH:
                    break
        except (pa.ArrowException, OSError) as error:
            cause = _cause(error, self.shard)
            return good, position, f"row {position} and those behind it in row group {group} cannot be read: {cause}"
        if position < self.group_starts[group + 1] and len(good) <= _ROWS_PER_BATCH:
            return good, position, f"row group {group} ends at row {position}, its footer says more"
        raise StorageUnavailable(f"shard {self.shard.path}: a read failed once ({cause}) and then did not; run again")

    def _group_of(self, row: int) -> int:
        """The row group holding ``row``; the current one while it does, so that a stream is read on."""
        low = max(self._group, 0)
        while self.group_starts[low + 1] <= row:
            low += 1
        return low


def _cause(error: Exception, shard: Shard) -> str:
    """The decoder's words, unless the storage failed: Arrow uses OSError for both, the storage's has an errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageUnavailable(f"shard {shard.path}: {error}; run the same command again") from error
    return str(error).partition("\n")[0]


def _with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in the schema's column order and types; a shard may hold large_string, dictionary or null."""
    columns = [
        column if column.type == wanted.type else column.cast(wanted.type)
        for wanted in schema
        for column in (batch.column(wanted.name),)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
