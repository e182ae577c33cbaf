"""What an export reads: the committed parts of an output, unit by unit, and what job.json says of them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import pyarrow as pa

from batchinfer.errors import OutputError
from batchinfer.records import ROW_ID, Plan, RowError, WorkUnit
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.layout import (
    ERRORS,
    committed_units,
    completions_part,
    errors_part,
    part_names,
    read_job,
    read_plan,
    unit_id_of,
)
from batchinfer.storage.location import Location
from batchinfer.storage.part_reader import read_part
from batchinfer.storage.writer import REASON_LOST, read_reasons

#: Parts fetched ahead of the one being written.
_PARTS_AHEAD = 8


@dataclass(frozen=True, slots=True)
class JobLabel:
    """What exported rows say of the job that made them."""

    #: The last part of the model's path: ``EXAONE-3.0-7.8B-Instruct``.
    model_name: str
    model_path: str
    model_revision: str | None
    fingerprint: str
    #: When the output was begun, seconds since 1970: the same in every export of it.
    created_s: int
    #: The column of ``prompt.request``.
    request_column: str | None
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeadRow:
    """A dead letter with what is known of its input row."""

    reason: RowError
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """An output at the moment when it was opened."""

    output: Location
    plan: Plan
    committed: frozenset[str]
    #: Committed units that have an errors part.
    failed: frozenset[str]
    job: JobLabel

    @property
    def num_units_missing(self) -> int:
        return sum(unit.unit_id not in self.committed for unit in self.plan.units)

    def units(self, *, ordered: bool) -> list[WorkUnit]:
        """The committed units, in the input's order or in that of their names."""
        units = [unit for shard in (*self.plan.retired, *self.plan.shards) for unit in shard.units]
        if not ordered:
            units.sort(key=lambda unit: unit.unit_id)
        return [unit for unit in units if unit.unit_id in self.committed]

    def tables(self, units: Sequence[WorkUnit], wanted: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The units' completions in this order, a few parts fetched ahead; of ``wanted`` columns those that are there.

        Raises OutputError for a damaged part, StorageUnavailable.
        """

        def read(unit: WorkUnit) -> pa.Table:
            place = completions_part(self.output, unit.unit_id)
            return read_part(place, wanted).replace_schema_metadata(None)

        with ThreadPoolExecutor(_PARTS_AHEAD, thread_name_prefix="export") as pool:
            waiting = iter(units)
            ahead = [pool.submit(read, unit) for unit in islice(waiting, _PARTS_AHEAD)]
            while ahead:
                table = ahead.pop(0).result()
                ahead += [pool.submit(read, unit) for unit in islice(waiting, 1)]
                yield table

    def dead_rows(self, unit: WorkUnit, completed: set[str]) -> list[DeadRow]:
        """The unit's rows that are not ``completed``, in row order; a reason that is lost says so."""
        lacking = [row_id for row_id in map(unit.row_id, range(unit.num_rows)) if row_id not in completed]
        if not lacking:
            return []
        place = errors_part(self.output, unit.unit_id)
        reasons = read_reasons(place) if unit.unit_id in self.failed else {}
        rows = {row[ROW_ID]: row for row in read_part(place).to_pylist()} if reasons else {}
        lost = "the reason is lost; `batchinfer retry-failed` tries the row again"
        return [
            DeadRow(reasons.get(row_id) or RowError(row_id, REASON_LOST, lost), rows.get(row_id, {}))
            for row_id in lacking
        ]


def open_source(output_path: str, storage_options: StorageOptions | None) -> Source:
    """Look at what an output holds now. Raises OutputError when there is no job, StorageUnavailable."""
    output = locate(output_path, storage_options)
    plan, described = read_plan(output), read_job(output)
    if plan is None or described is None:
        raise OutputError(f"{output}: no batchinfer job there; check the path")
    committed = frozenset(committed_units(output))
    failed = frozenset(unit_id for name in part_names(output, ERRORS) if (unit_id := unit_id_of(name)) is not None)
    return Source(output, plan, committed, failed & committed, _label(described))


def _label(described: dict[str, Any]) -> JobLabel:
    spec = described.get("spec") or {}
    model = spec.get("model") or {}
    path = str(model.get("path") or described.get("name") or "model")
    created = described.get("created_at")
    return JobLabel(
        model_name=path.rstrip("/").rpartition("/")[2],
        model_path=path,
        model_revision=model.get("revision"),
        fingerprint=str(described.get("fingerprint")),
        created_s=int(datetime.fromisoformat(created).timestamp()) if created else 0,
        request_column=(spec.get("prompt") or {}).get("request"),
        sampling=spec.get("sampling") or {},
    )
