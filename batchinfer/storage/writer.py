"""Publishing a finished work unit: dead letters first, completions last, and the completions part is the commit."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import PartExists
from batchinfer.records import (
    COMPLETION,
    FINISH_REASON,
    FORMAT_VERSION,
    LOGPROBS,
    NUM_COMPLETION_TOKENS,
    NUM_PROMPT_TOKENS,
    ROW_ID,
    SAMPLE,
    TOKEN_IDS,
    Completion,
    RowError,
    TokenLogprobs,
    WorkUnit,
)
from batchinfer.storage.layout import completions_part, errors_part, staging
from batchinfer.storage.location import Location

#: Columns of a part by name, its key-value metadata, row offsets within a unit.
Columns = dict[str, "pa.Array[Any] | pa.ChunkedArray[Any]"]
Metadata = dict[bytes | str, bytes | str]
Offsets = np.ndarray[Any, np.dtype[np.int64]]

Compression = Literal["zstd", "snappy", "gzip", "lz4", "none"]

ERROR_TYPE = "error_type"
ERROR = "error"
ATTEMPTS = "attempts"

#: Reason in a dead letter whose own reason was lost with the writer that found it.
REASON_LOST = "reason_lost"

_TOP = pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32())])
_LOGPROBS = pa.list_(
    pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32()), pa.field("top", pa.list_(_TOP))])
)


@dataclass(frozen=True, slots=True)
class PartFormat:
    """What every part of a run carries beside its rows, and which columns it has."""

    fingerprint: str
    run_id: str
    #: Input columns passed through, in this order.
    columns: tuple[str, ...]
    #: Samples per row the job asked for; rows may have asked for another number.
    n: int = 1
    token_ids: bool = False
    logprobs: bool = False
    compression: Compression = "zstd"


class PublishOutcome(Enum):
    """Who committed the unit."""

    COMMITTED = "committed"
    #: The unit's part was there already, from an earlier attempt or another replica; nothing of ours was added.
    ALREADY_COMMITTED = "already_committed"


def publish_unit(
    output: Location,
    unit: WorkUnit,
    rows: pa.Table,
    completions: Sequence[Completion],
    errors: Sequence[RowError],
    part: PartFormat,
) -> PublishOutcome:
    """Publish a unit whose rows all have an end: every row of it is in ``completions`` or in ``errors``, not in both.

    ``rows`` holds the unit's rows from its first on, fewer where a damaged shard gave no more; row k of it is
    ``unit.row_id(k)``. The order of ``completions`` and ``errors`` does not matter, the parts are sorted by row
    and sample. May be repeated after any failure. Raises ValueError when rows are missing or doubled,
    StorageUnavailable or OutputError when the output cannot be written; the unit is then uncommitted, or
    committed whole.
    """
    completions_table, errors_table = _tables(unit, rows, completions, errors, part)
    committed = completions_part(output, unit.unit_id)
    dead_letters = errors_part(output, unit.unit_id)

    # A crash up to here leaves nothing; the next run does the unit again.
    if committed.is_file():
        # Committed by an earlier attempt whose success nobody heard of: its errors part belongs to it, hands off.
        return PublishOutcome.ALREADY_COMMITTED

    if errors_table.num_rows:
        dead_letters.write_replace(_parquet(errors_table, part.compression), staging(output))
    else:
        # An earlier attempt may have died right before its commit and left dead letters that are none now.
        dead_letters.remove()
    # A crash here leaves an errors part without a commit: readers go by committed units, and the unit's next
    # attempt replaces or removes it.

    try:
        committed.create_exclusive(_parquet(completions_table, part.compression), staging(output))
    except PartExists:
        # Another replica committed between our look and our attempt; our errors part may have replaced its own.
        # A crash before the repair ends leaves dead letters of the wrong attempt: verify names the unit.
        _fit_errors_to_commit(committed, dead_letters, unit, errors_table, rows, part, staging(output))
        return PublishOutcome.ALREADY_COMMITTED
    # A crash from here on leaves a committed unit; resume finds its part by listing and does not do it again.
    return PublishOutcome.COMMITTED


def _tables(
    unit: WorkUnit, rows: pa.Table, completions: Sequence[Completion], errors: Sequence[RowError], part: PartFormat
) -> tuple[pa.Table, pa.Table]:
    ordered = sorted(zip(_offsets(unit, completions), completions, strict=True), key=lambda it: (it[0], it[1].sample))
    failed = sorted(zip(_offsets(unit, errors), errors, strict=True), key=lambda it: it[0])
    offsets = np.fromiter((offset for offset, _ in ordered), np.int64, len(ordered))
    failed_offsets = np.fromiter((offset for offset, _ in failed), np.int64, len(failed))
    _check_accounted(unit, rows, ordered, offsets, failed_offsets)

    metadata = _metadata(unit, part, num_completions=len(ordered), num_dead_letters=len(failed))
    passed = rows.select(list(part.columns))
    completions_table = _table(
        _taken(passed, offsets) | _generated([completion for _, completion in ordered], part), metadata
    )
    errors_table = _errors_table(unit, passed, failed_offsets, [error for _, error in failed], metadata)
    return completions_table, errors_table


def _offsets(unit: WorkUnit, items: Sequence[Completion] | Sequence[RowError]) -> list[int]:
    """Row offsets within the unit, out of row ids; ValueError for an id of another unit."""
    prefix = f"{unit.shard_id}:"
    offsets = []
    for item in items:
        row = item.row_id.removeprefix(prefix)
        offset = int(row) - unit.first_row if row.isdecimal() else -1
        if not 0 <= offset < unit.num_rows:
            raise ValueError(f"row {item.row_id} does not belong to unit {unit.unit_id}")
        offsets.append(offset)
    return offsets


def _check_accounted(
    unit: WorkUnit,
    rows: pa.Table,
    ordered: Sequence[tuple[int, Completion]],
    offsets: Offsets,
    failed_offsets: Offsets,
) -> None:
    """The last gate before the commit: each row ended once, samples are 0, 1, 2 ... and their input was read."""
    num_samples = np.bincount(offsets, minlength=unit.num_rows)
    num_errors = np.bincount(failed_offsets, minlength=unit.num_rows)
    wrong = np.flatnonzero((num_samples > 0).astype(np.int64) + num_errors != 1)
    if wrong.size:
        raise ValueError(
            f"unit {unit.unit_id}: row {unit.row_id(int(wrong[0]))} and {wrong.size - 1} others have no end or two"
        )
    expected = 0
    previous = -1
    for offset, completion in ordered:
        expected = expected + 1 if offset == previous else 0
        previous = offset
        if completion.sample != expected:
            raise ValueError(f"row {completion.row_id}: sample {completion.sample} where {expected} was due")
    if previous >= rows.num_rows:
        raise ValueError(f"unit {unit.unit_id}: a completion for row {unit.row_id(previous)}, which was not read")


def _metadata(unit: WorkUnit, part: PartFormat, *, num_completions: int, num_dead_letters: int) -> Metadata:
    return {
        "batchinfer.format_version": str(FORMAT_VERSION),
        "batchinfer.unit_id": unit.unit_id,
        "batchinfer.fingerprint": part.fingerprint,
        "batchinfer.run_id": part.run_id,
        "batchinfer.num_rows": str(unit.num_rows),
        "batchinfer.num_completions": str(num_completions),
        "batchinfer.num_dead_letters": str(num_dead_letters),
        "batchinfer.n": str(part.n),
    }


def _table(columns: Columns, metadata: Metadata) -> pa.Table:
    """Every column nullable, whatever the input declared, so that all parts of both kinds share their types."""
    schema = pa.schema([pa.field(name, column.type) for name, column in columns.items()], metadata=metadata)
    return pa.Table.from_arrays(list(columns.values()), schema=schema)


def _taken(passed: pa.Table, offsets: Offsets) -> Columns:
    """Input columns at the offsets; null where the row could not be read."""
    indices = cast(pa.Int64Array, pa.array(offsets, mask=offsets >= passed.num_rows))
    return {name: passed.column(name).take(indices) for name in passed.column_names}


def _generated(completions: Sequence[Completion], part: PartFormat) -> Columns:
    columns: Columns = {
        ROW_ID: pa.array([c.row_id for c in completions], pa.string()),
        SAMPLE: pa.array([c.sample for c in completions], pa.int32()),
        COMPLETION: pa.array([c.text for c in completions], pa.string()),
        FINISH_REASON: pa.array([c.finish_reason for c in completions], pa.string()),
        NUM_PROMPT_TOKENS: pa.array([c.num_prompt_tokens for c in completions], pa.int32()),
        NUM_COMPLETION_TOKENS: pa.array([len(c.token_ids) for c in completions], pa.int32()),
    }
    if part.token_ids:
        columns[TOKEN_IDS] = pa.array([c.token_ids for c in completions], pa.list_(pa.int32()))
    if part.logprobs:
        columns[LOGPROBS] = _logprobs([c.logprobs for c in completions])
    return columns


def _logprobs(rows: Sequence[tuple[TokenLogprobs, ...] | None]) -> "pa.Array[Any]":
    """Built from flat columns and offsets: a dict per token would cost more than the rest of the part."""
    tokens = [token for row in rows for token in row or ()]
    top = [candidate for token in tokens for candidate in token.top]
    top_structs = pa.StructArray.from_arrays(
        [pa.array([token_id for token_id, _ in top], pa.int32()), pa.array([p for _, p in top], pa.float32())],
        fields=list(_TOP),
    )
    top_lists = _lists([len(token.top) for token in tokens], top_structs)
    token_structs = pa.StructArray.from_arrays(
        [
            pa.array([token.token_id for token in tokens], pa.int32()),
            pa.array([token.logprob for token in tokens], pa.float32()),
            top_lists,
        ],
        fields=list(_LOGPROBS.value_type),
    )
    is_null = pa.array([row is None for row in rows], pa.bool_())
    return _lists([len(row or ()) for row in rows], token_structs, mask=is_null)


def _lists(lengths: Sequence[int], values: "pa.Array[Any]", mask: pa.BooleanArray | None = None) -> "pa.ListArray[Any]":
    """``values`` dealt out to lists of these lengths in order."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return pa.ListArray.from_arrays(cast(pa.Int32Array, pa.array(starts)), values, mask=mask)


def _errors_table(
    unit: WorkUnit,
    passed: pa.Table,
    offsets: Offsets,
    errors: Sequence[RowError],
    metadata: Metadata,
) -> pa.Table:
    # An input column that has the name of a reason's column is left out here; the completions part keeps it.
    columns: Columns = {ROW_ID: pa.array([unit.row_id(int(offset)) for offset in offsets], pa.string())}
    reasons: Columns = {
        ERROR_TYPE: pa.array([error.error_type for error in errors], pa.string()),
        ERROR: pa.array([error.error for error in errors], pa.string()),
        ATTEMPTS: pa.array([error.attempts for error in errors], pa.int32()),
    }
    columns |= {name: column for name, column in _taken(passed, offsets).items() if name not in reasons}
    return _table(columns | reasons, metadata)


def _fit_errors_to_commit(
    committed: Location,
    dead_letters: Location,
    unit: WorkUnit,
    ours: pa.Table,
    rows: pa.Table,
    part: PartFormat,
    staging_directory: Location,
) -> None:
    """Make the errors part hold exactly the rows that the committed part lacks.

    A row that only the other writer gave up keeps no reason but that; its input columns are the same anyway.
    """
    with committed.open_random() as source:
        theirs = pq.read_table(source, columns=[ROW_ID])
    present = set(theirs.column(ROW_ID).to_pylist())
    lacking = [offset for offset in range(unit.num_rows) if unit.row_id(offset) not in present]
    if not lacking:
        dead_letters.remove()
        return
    ours_by_row = {
        row_id: RowError(row_id, error_type, error, attempts)
        for row_id, error_type, error, attempts in zip(
            *(ours.column(name).to_pylist() for name in (ROW_ID, ERROR_TYPE, ERROR, ATTEMPTS)), strict=True
        )
    }
    errors = [
        ours_by_row.get(unit.row_id(offset))
        or RowError(unit.row_id(offset), REASON_LOST, "given up by another attempt, which committed the unit")
        for offset in lacking
    ]
    metadata = _metadata(unit, part, num_completions=theirs.num_rows, num_dead_letters=len(errors))
    table = _errors_table(unit, rows.select(list(part.columns)), np.array(lacking, np.int64), errors, metadata)
    dead_letters.write_replace(_parquet(table, part.compression), staging_directory)


def _parquet(table: pa.Table, compression: Compression) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, write_page_checksum=True)
    return sink.getvalue().to_pybytes()
