"""An output whose events tell of two runs, one replica's death and two dead letters: something to report."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from batchinfer.report.run_report import RunReport, read_report
from batchinfer.storage.events import Event, EventValue
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import RUNS
from batchinfer.storage.location import Location
from tests.outputs import (
    PART,
    begin_job,
    completions_of,
    dead_letters_of,
    planned,
    publish,
    publish_unit,
    read_rows,
    write_shard,
)

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


#: Of the 9 idle seconds, what was waited for in 8.
IDLE = {"idle_rows_s": 5.0, "idle_publishing_s": 2.0, "idle_units_s": 1.0}


def event(kind: str, at_s: float, **fields: EventValue) -> Event:
    return {"at": (START + timedelta(seconds=at_s)).isoformat(), "event": kind, **fields}


def one_run(begin_s: float = 0.0, run: str = "run-1") -> Iterator[Event]:
    """100 s: two replicas, one dies at 60 s; six units of 10 rows."""
    yield event("run_started", begin_s, run=run, host="gpu-17")
    for replica in (0, 1):
        yield event("replica_starting", begin_s + 1, replica=replica)
        yield event(
            "replica_ready", begin_s + 11, replica=replica, device="cuda:0", node="n", engine="padded", capacity=8
        )
    for unit in range(6):
        yield event(
            "unit_committed",
            begin_s + 20 + 10 * unit,
            replica=unit % 2,
            num_rows=10,
            num_prompt_tokens=300,
            num_completion_tokens=500,
            num_dead_letters=1 if unit == 2 else 0,
            num_shared_sequences=1,
            quality={"repeating": 2},
        )
    yield event("replica_stats", begin_s + 50, replica=1, batch_fill=0.5, kv_use=0.25, idle_s=9.0, **IDLE)
    yield event("unit_failed", begin_s + 55, replica=0, unit="u", error="StorageUnavailable: gone")
    yield event("replica_died", begin_s + 60, replica=0, error="RayActorError: its process ended")
    yield event("run_finished", begin_s + 100, outcome="done", error="")


def reported(tmp_path: Path, *, price: float | None = None, hostile: str = "") -> RunReport:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    for unit in plan.units[1:]:
        publish(output, plan, unit)
    unit = plan.units[0]
    errors = dead_letters_of(unit, [0, 1], error_type=hostile or "too_long")
    publish_unit(output, unit, read_rows(plan.shards[0], unit), completions_of(unit, range(2, 10)), errors, PART)
    write_events(output, [*one_run(), *one_run(5000.0, "run-2")])
    return read_report(str(output), price_per_gpu_hour=price)


def write_events(output: Location, events: list[Event]) -> None:
    content = b"".join(json.dumps(each).encode() + b"\n" for each in events)
    output.child(f"{RUNS}/run-1.jsonl").write_replace(content, output.child("_job/tmp"))
