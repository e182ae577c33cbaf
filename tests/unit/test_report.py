"""What an output says of itself, from its files alone."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.errors import OutputError
from batchinfer.records import UnreadableShard
from batchinfer.report import read_rows, read_status
from batchinfer.storage.events import AppendedEvents
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import staging, write_plan
from batchinfer.storage.lease import LeaseRecord, Process, acquire
from batchinfer.storage.location import Location
from tests.outputs import begin_job, finished_job, planned, publish, write_shard

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def half_done(tmp_path: Path) -> Location:
    """Three units of a 25-row shard, the first one committed with one dead letter."""
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    publish(output, plan, plan.units[0], dead=[4])
    return output


def write_lease(output: Location, *, silent_s: float) -> None:
    """A lease held on another machine, which nobody here can look into."""
    beat = datetime.now(UTC) - timedelta(seconds=silent_s)
    process = Process("gpu-17", 4242, "99", "another boot", "pid:[1]")
    record = LeaseRecord("run-9", 1, beat.isoformat(), beat.isoformat(), 60.0, process)
    output.child("_job/lease.json").write_replace(json.dumps(asdict(record)).encode(), staging(output))


def test_a_directory_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no batchinfer job there"):
        read_status(str(tmp_path))


def test_before_its_first_replica_is_ready_a_run_is_named(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"))
    acquire(output, "run-1", 60.0)
    with pytest.raises(OutputError, match=r"run run-1 on .* is still loading its first replica"):
        read_status(str(output))


def test_an_output_nobody_works_on_is_unfinished(tmp_path: Path) -> None:
    status = read_status(str(half_done(tmp_path)))
    assert status.state == "unfinished"
    assert (status.num_units, status.num_units_committed) == (3, 1)
    assert (status.num_rows, status.num_rows_committed, status.num_dead_letters) == (25, 10, 1)
    assert status.holder is None
    assert status.last_run is None
    json.dumps(status.as_json())


def test_a_live_lease_means_that_a_run_works_on_it(tmp_path: Path) -> None:
    output = half_done(tmp_path)
    write_lease(output, silent_s=5.0)
    status = read_status(str(output))
    assert status.state == "running"
    assert status.holder is not None
    assert (status.holder.run_id, status.holder.host, status.holder.pid) == ("run-9", "gpu-17", 4242)


def test_a_stale_lease_means_nothing(tmp_path: Path) -> None:
    output = half_done(tmp_path)
    write_lease(output, silent_s=61.0)
    assert read_status(str(output)).state == "unfinished"


def test_the_lease_of_a_dead_process_here_means_nothing(tmp_path: Path) -> None:
    output = half_done(tmp_path)
    lease = acquire(output, "run-1", 60.0)
    gone = replace(lease.record, process=replace(lease.record.process, start_time="1"))
    output.child("_job/lease.json").write_replace(json.dumps(asdict(gone)).encode(), staging(output))
    assert read_status(str(output)).state == "unfinished"


def test_a_finished_output_is_complete(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    status = read_status(str(output))
    assert status.state == "complete"
    assert status.num_rows_committed == 25


def test_dead_letters_are_said(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path, dead=[3, 4])
    status = read_status(str(output))
    assert status.state == "dead_letters"
    assert status.num_dead_letters == 2


def test_an_unreadable_shard_is_no_complete_output(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    write_plan(output, replace(plan, unreadable=(UnreadableShard("b.parquet", "b.parquet", 4, "truncated"),)))
    status = read_status(str(output))
    assert status.state == "dead_letters"
    assert (status.num_shards, status.num_unreadable_shards) == (1, 1)


def test_the_newest_run_is_told_from_its_events(tmp_path: Path) -> None:
    output = half_done(tmp_path)
    moments = iter(START + timedelta(seconds=second) for second in range(100))
    clock: Callable[[], datetime] = lambda: next(moments)  # noqa: E731
    for run_id in ("run-1", "run-2"):
        log = AppendedEvents(output.child(f"_job/runs/{run_id}.jsonl"), clock)
        log.write("run_started", run=run_id)
        log.write("unit_committed", num_completion_tokens=100)
        log.write("unit_failed", error="503")
        log.write("replica_died", error="OutOfMemory")
        log.write("unit_committed", num_completion_tokens=20)
    # A crash tore the last line.
    output.child("_job/runs/run-2.jsonl").append(b'{"at": "2026-01-02T03:0')
    run = read_status(str(output)).last_run
    assert run is not None
    assert (run.run_id, run.last_event) == ("run-2", "unit_committed")
    assert (run.num_units_committed, run.num_completion_tokens) == (2, 120)
    assert (run.num_unit_failures, run.num_replicas_died) == (1, 1)
    assert run.completion_tokens_per_s == pytest.approx(30.0)


def test_the_first_rows_come_in_the_order_of_the_shards_rows(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path, dead=[0])
    rows = read_rows(str(output), num_rows=12)
    assert [row["id"] for row in rows] == list(range(1, 13))
    assert read_rows(str(output), num_rows=100)[-1]["id"] == 24


def test_rows_of_an_output_without_any_are_refused(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"))
    with pytest.raises(OutputError, match="nothing is committed in completions/"):
        read_rows(str(output))


def test_first_rows_come_in_the_order_of_shard_paths(tmp_path: Path) -> None:
    for index in range(6):
        write_shard(tmp_path / "in" / f"{index}.parquet", 3, first=10 * index)
    plan = planned(tmp_path / "in")
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    for unit in plan.units:
        publish(output, plan, unit)
    ids = [row["id"] for row in read_rows(str(tmp_path / "out"), num_rows=18)]
    assert ids == [10 * index + row for index in range(6) for row in range(3)]
