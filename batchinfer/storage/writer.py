"""Publishing a finished work unit: dead letters first, completions last, and the completions part is the commit.

Which rows of a committed unit are dead letters follows from its completions part alone: those it lacks. The errors
part says why; whatever a crash or a race makes of it, no row is lost or doubled by that.
"""

from collections.abc import Sequence
from enum import Enum

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import PartExists
from batchinfer.records import ROW_ID, Completion, RowError, WorkUnit
from batchinfer.storage.footer import key_values
from batchinfer.storage.layout import completions_part, errors_part, staging
from batchinfer.storage.location import Location
from batchinfer.storage.part_tables import (
    ATTEMPTS,
    ERROR,
    ERROR_TYPE,
    Compression,
    DeadRows,
    Offsets,
    PartFormat,
    by_row,
    completions_table,
    errors_by_row,
    errors_table,
    lacking_offsets,
    part_bytes,
    part_metadata,
    reasons_of,
)

__all__ = [
    "ATTEMPTS",
    "ERROR",
    "ERROR_TYPE",
    "REASON_LOST",
    "Compression",
    "PartFormat",
    "PublishOutcome",
    "publish_unit",
    "read_reasons",
]

#: Reason in a dead letter whose own reason was lost with the writer that found it.
REASON_LOST = "reason_lost"


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
    ordered = by_row(unit, completions)
    failed = errors_by_row(unit, errors)
    offsets = np.fromiter((offset for offset, _ in ordered), np.int64, len(ordered))
    dead_rows = np.fromiter((offset for offset, _ in failed), np.int64, len(failed))
    _check_accounted(unit, rows, ordered, offsets, dead_rows)
    metadata = part_metadata(unit, part, len(ordered), len(failed))
    label = DeadRows.of(unit, dead_rows)
    committed = completions_part(output, unit.unit_id)
    dead_letters = errors_part(output, unit.unit_id)

    # A crash up to here leaves nothing; the next run does the unit again.
    if committed.is_file():
        # Committed by an earlier attempt whose success nobody heard of: its errors part belongs to it, hands off.
        return PublishOutcome.ALREADY_COMMITTED

    if failed:
        table = errors_table(unit, rows, dead_rows, [error for _, error in failed], part, metadata)
        dead_letters.write_replace(part_bytes(table, label, part.compression), staging(output))
    # A crash here leaves an errors part without a commit: readers go by committed units, and the unit's next
    # attempt replaces or removes it.

    table = completions_table(rows, offsets, [completion for _, completion in ordered], part, metadata)
    try:
        committed.create_exclusive(part_bytes(table, label, part.compression), staging(output))
    except PartExists:
        # Another replica committed between our look and our attempt; our errors part may have replaced its own.
        # A crash before the repair ends leaves reasons of the wrong attempt, which the next run repairs.
        fit_errors_to_commit(output, unit, rows, [error for _, error in failed], part)
        return PublishOutcome.ALREADY_COMMITTED
    # A crash from here on leaves a committed unit; resume finds its part by listing and does not do it again.
    if not failed:
        # An earlier attempt may have died right before its commit and left dead letters that are none now. They are
        # removed only behind the commit: before it they might be those of a replica that commits first. A crash
        # before this line leaves them to the next run, which sees in both footers that they do not belong together.
        dead_letters.remove()
    return PublishOutcome.COMMITTED


def fit_errors_to_commit(
    output: Location, unit: WorkUnit, rows: pa.Table, reasons: Sequence[RowError], part: PartFormat
) -> int:
    """Make a committed unit's errors part hold exactly the rows that its completions part lacks; returns how many.

    A row's reason is the one in ``reasons``, else the one the errors part had; a row that neither names keeps no
    reason but that it was lost. ``rows`` are the unit's input rows as ``publish_unit`` takes them. The errors part
    keeps the format of the completions part, which is not touched. May be repeated.
    """
    with completions_part(output, unit.unit_id).open_random() as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        theirs = file.read(columns=[ROW_ID], use_threads=False)
    lacking = lacking_offsets(unit, theirs.column(ROW_ID))
    place = errors_part(output, unit.unit_id)
    if not len(lacking):
        place.remove()
        return 0
    known = read_reasons(place) | {error.row_id: error for error in reasons}
    errors = [known.get(unit.row_id(int(offset))) or _reason_lost(unit.row_id(int(offset))) for offset in lacking]
    # Of the run that committed, and of its job: that is what the two parts of a unit have in common.
    committed_by = key_values(file.metadata)
    metadata = part_metadata(unit, part, theirs.num_rows, len(lacking)) | {
        f"batchinfer.{name}": committed_by[name] for name in ("fingerprint", "run_id", "n") if name in committed_by
    }
    table = errors_table(unit, rows, lacking, errors, part, metadata)
    place.write_replace(part_bytes(table, DeadRows.of(unit, lacking), part.compression), staging(output))
    return len(lacking)


def read_reasons(place: Location) -> dict[str, RowError]:
    """The dead letters in an errors part by row id; none when it is not there or damaged."""
    content = place.read_if_present()
    if content is None:
        return {}
    try:
        return reasons_of(pq.read_table(pa.BufferReader(content), page_checksum_verification=True))
    except (pa.ArrowException, OSError, KeyError, TypeError):
        # Reasons alone are lost; which rows they were for is known from the completions part.
        return {}


def _reason_lost(row_id: str) -> RowError:
    return RowError(row_id, REASON_LOST, "the attempt that committed the unit gave it up; why is not known any more")


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
    check_samples(ordered)
    last = int(offsets[-1]) if len(offsets) else -1
    if last >= rows.num_rows:
        raise ValueError(f"unit {unit.unit_id}: a completion for row {unit.row_id(last)}, which was not read")


def check_samples(ordered: Sequence[tuple[int, Completion]]) -> None:
    """ValueError unless every row's samples are 0, 1, 2 ...; ``ordered`` by row offset and sample."""
    expected, previous = 0, -1
    for offset, completion in ordered:
        expected = expected + 1 if offset == previous else 0
        previous = offset
        if completion.sample != expected:
            raise ValueError(f"row {completion.row_id}: sample {completion.sample} where {expected} was due")
