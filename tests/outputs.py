"""Builders of inputs and outputs for tests: small shards, and outputs written the way replicas write them."""

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.planner import plan_input
from batchinfer.records import Completion, Plan, RowError, Shard, WorkUnit
from batchinfer.storage.dead_letters import look_at_dead_letters
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import COMPLETIONS, ERRORS, parts, write_job, write_plan
from batchinfer.storage.location import Location
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat, PublishOutcome, publish_unit

FINGERPRINT = "f" * 16
PART = PartFormat(fingerprint=FINGERPRINT, run_id="run-1", columns=("id", "text"))
NO_WAIT = RetryPolicy(max_attempts=3, initial_s=0.0, max_s=0.0)


def memory_uri() -> str:
    """A place of its own in fsspec's memory filesystem, which behaves as an object store does."""
    return f"memory://test-{uuid.uuid4().hex}"


def rows_table(num_rows: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + num_rows)
    return pa.table(
        {"id": pa.array(numbers, pa.int64()), "text": pa.array([f"row {number}" for number in numbers], pa.string())}
    )


def write_shard(path: Path, num_rows: int, *, row_group_size: int | None = None, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows_table(num_rows, first), path, row_group_size=row_group_size, write_page_checksum=True)
    return path


def planned(path: Path | str, rows_per_unit: int = 10) -> Plan:
    return plan_input([str(path)], None, rows_per_unit).plan


def completions_of(unit: WorkUnit, offsets: Iterable[int] | None = None, n: int = 1) -> list[Completion]:
    return [
        Completion(unit.row_id(offset), sample, f"answer {offset}.{sample}", (1, 2, 3), "stop", 5)
        for offset in (range(unit.num_rows) if offsets is None else offsets)
        for sample in range(n)
    ]


def dead_letters_of(unit: WorkUnit, offsets: Iterable[int], error_type: str = "too_long") -> list[RowError]:
    return [RowError(unit.row_id(offset), error_type, "4097 tokens do not fit 4096") for offset in offsets]


def read_rows(shard: Shard, unit: WorkUnit) -> pa.Table:
    reader = ParquetReader(locate, rows_table(0).schema)
    try:
        return reader.read_unit(shard, unit).table
    finally:
        reader.close()


def publish(
    output: Location,
    plan: Plan,
    unit: WorkUnit,
    *,
    dead: Sequence[int] = (),
    error_type: str = "too_long",
    n: int = 1,
    part: PartFormat = PART,
) -> PublishOutcome:
    """Publish a unit of a plan over ``write_shard`` files: the ``dead`` offsets as dead letters, the rest completed."""
    shard = next(shard for shard in plan.shards if shard.shard_id == unit.shard_id)
    completed = [offset for offset in range(unit.num_rows) if offset not in dead]
    completions = completions_of(unit, completed, n)
    return publish_unit(
        output, unit, read_rows(shard, unit), completions, dead_letters_of(unit, dead, error_type), part
    )


def begin_job(output: Location, plan: Plan, n: int = 1, sampling_column: str | None = None) -> None:
    """What a run writes before its first unit."""
    write_plan(output, plan)
    write_job(output, {"name": "test", "fingerprint": FINGERPRINT, "n": n, "sampling_column": sampling_column})


def finished_job(
    tmp_path: Path, num_rows: int = 25, n: int = 1, dead: Sequence[int] = (), error_type: str = "too_long"
) -> tuple[Location, Plan]:
    """An output with every unit of one shard committed; ``dead`` are offsets in its first unit."""
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", num_rows).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan, n)
    for unit in plan.units:
        publish(output, plan, unit, dead=dead if unit.first_row == 0 else (), error_type=error_type, n=n)
    return output, plan


def num_dead_letters(output: Location) -> int:
    """Dead letters of all committed units, as runs and status count them."""
    return look_at_dead_letters(output, parts(output, COMPLETIONS), parts(output, ERRORS)).total
