"""Publishing again a committed unit some of whose dead letters have become completions.

The completions part is replaced in one atomic step by one that holds the old rows and the new ones, then the errors
part by what is left of it. So at every moment each row is either in the completions part or a dead letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from batchinfer.errors import OutputError
from batchinfer.records import ROW_ID, SAMPLE, Completion, RowError, WorkUnit
from batchinfer.storage.layout import completions_part, errors_part, staging
from batchinfer.storage.location import Location
from batchinfer.storage.part_reader import read_part
from batchinfer.storage.part_tables import (
    DeadRows,
    Offsets,
    PartFormat,
    by_row,
    completions_table,
    lacking_offsets,
    part_bytes,
    part_metadata,
)
from batchinfer.storage.writer import check_samples, fit_errors_to_commit, read_reasons


@dataclass(frozen=True, slots=True)
class Republished:
    """What a committed unit holds now."""

    #: Completions that were not there before.
    num_new_completions: int
    #: Rows that it still lacks.
    num_dead_letters: int


def lacking_rows(output: Location, unit: WorkUnit) -> Offsets:
    """Offsets, ascending, of the rows that a committed unit's completions part lacks: its dead letters.

    Raises OutputError when the part cannot be read.
    """
    return lacking_offsets(unit, read_part(completions_part(output, unit.unit_id)).column(ROW_ID))


def republish_unit(
    output: Location,
    unit: WorkUnit,
    rows: pa.Table,
    completions: Sequence[Completion],
    errors: Sequence[RowError],
    part: PartFormat,
) -> Republished:
    """Add completions to a committed unit; ``errors`` are rows that were tried and failed again.

    ``rows`` as ``writer.publish_unit`` takes them. Rows that are neither in ``completions`` nor in ``errors`` stay as
    they are, and so do rows that are completed already: a second writer adds nothing twice. May be repeated after
    any failure. Not for two writers at once: of what each adds, the later replacement's is kept (the other's rows
    are dead letters again, none is lost), so a caller holds the output's lease.

    Raises ValueError when samples are missing or doubled, OutputError when the committed part cannot be read,
    StorageUnavailable when the storage fails; the unit is then as it was, or as it is to be.
    """
    committed = read_part(completions_part(output, unit.unit_id))
    lacking = set(lacking_offsets(unit, committed.column(ROW_ID)).tolist())
    ordered = by_row(unit, completions)
    check_samples(ordered)
    added = [(offset, completion) for offset, completion in ordered if offset in lacking]
    if added:
        offsets = np.array([offset for offset, _ in added], np.int64)
        dead_rows = np.array(sorted(lacking - set(offsets.tolist())), np.int64)
        metadata = part_metadata(unit, part, committed.num_rows + len(added), len(dead_rows))
        new = completions_table(rows, offsets, [completion for _, completion in added], part, metadata)
        # A crash up to here leaves the unit as it was; the next retry generates the rows again, or takes them from
        # its journal.
        content = part_bytes(_merged(unit, committed, new), DeadRows.of(unit, dead_rows), part.compression)
        completions_part(output, unit.unit_id).write_replace(content, staging(output))
        # A crash here leaves an errors part that names rows which are completed now. They are not counted, since the
        # completions part alone decides; the next run or retry fits the errors part to it.
    known = read_reasons(errors_part(output, unit.unit_id))
    tried = [
        replace(error, attempts=error.attempts + (known[error.row_id].attempts if error.row_id in known else 0))
        for error in errors
    ]
    num_dead_letters = fit_errors_to_commit(output, unit, rows, tried, part)
    # A crash from here on leaves a unit that is done; the next retry finds only what it still lacks.
    return Republished(len(added), num_dead_letters)


def _merged(unit: WorkUnit, committed: pa.Table, new: pa.Table) -> pa.Table:
    """Old rows and new ones by row and sample, in the committed part's columns and with the new one's metadata."""
    wanted = committed.schema.remove_metadata()
    missing = [name for name in wanted.names if name not in new.column_names]
    if missing:
        raise OutputError(
            f"unit {unit.unit_id}: its part has the columns {', '.join(missing)}, which the job does not pass through "
            "now; name them in output.columns"
        )
    # Null in one of them where the other has values: a unit may have held nothing but nulls.
    merged = pa.concat_tables(
        [committed.replace_schema_metadata(None), new.select(wanted.names).replace_schema_metadata(None)],
        promote_options="permissive",
    )
    first = len(f"{unit.shard_id}:")
    numbers = np.array([int(str(row_id)[first:]) for row_id in merged.column(ROW_ID).to_pylist()], np.int64)
    order = np.lexsort((merged.column(SAMPLE).to_numpy(), numbers))
    return merged.take(order).replace_schema_metadata(new.schema.metadata)
