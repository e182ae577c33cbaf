"""What events tell of the run that goes on: replicas, rates, the time left, dead letters by cause."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.report import read_status
from batchinfer.report.run_now import RunNow, RunWatch
from batchinfer.storage.events import Event, EventValue
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import staging
from batchinfer.storage.lease import LeaseRecord, Process
from tests.outputs import begin_job, planned, publish, write_shard

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def event(second: float, kind: str, **fields: EventValue) -> Event:
    return {"at": (START + timedelta(seconds=second)).isoformat(), "event": kind, **fields}


def watched(*events: Event) -> RunWatch:
    watch = RunWatch()
    assert list(watch.watching(events)) == list(events)
    return watch


def ready(replica: int, second: float = 0.0) -> list[Event]:
    return [
        event(second, "replica_starting", replica=replica),
        event(second, "replica_ready", replica=replica, node="node-a", device="cuda:0", capacity=64),
    ]


def stats(replica: int, second: float, tokens: int, **fields: EventValue) -> Event:
    usual: dict[str, EventValue] = {
        "num_prompt_tokens": tokens,
        "num_completion_tokens": 2 * tokens,
        "batch_fill": 0.9,
        "kv_use": 0.5,
        "num_places": 1000,
        "idle_s": second / 10,
        "num_preemptions": 3,
    }
    return event(second, "replica_stats", replica=replica, **{**usual, **fields})


def committed(second: float, unit: str, num_rows: int = 10, replica: int = 0, **dead: EventValue) -> Event:
    by_type: dict[str, EventValue] = {"dead_letters_by_type": dict(dead)} if dead else {}
    return event(second, "unit_committed", replica=replica, unit=unit, num_rows=num_rows, **by_type)


BEGUN = event(0.0, "run_started", run="run-1")


def test_a_replicas_rates_are_those_between_its_last_two_reports() -> None:
    watch = watched(
        BEGUN, *ready(0), stats(0, 30.0, 300), stats(0, 60.0, 900), event(61.0, "replica_starting", replica=1)
    )
    now = watch.now(100)
    running, starting = now.replicas
    assert (running.state, running.node, running.device) == ("running", "node-a", "cuda:0")
    assert (running.prompt_tokens_per_s, running.completion_tokens_per_s) == (20.0, 40.0)
    assert (running.batch_fill, running.kv_use, running.num_preemptions) == (0.9, 0.5, 3)
    assert running.idle_share == pytest.approx(0.1)
    assert (starting.state, starting.batch_fill, starting.completion_tokens_per_s) == ("starting", None, None)
    assert (now.prompt_tokens_per_s, now.completion_tokens_per_s) == (20.0, 40.0)


def test_the_first_report_is_held_against_the_replicas_start() -> None:
    (look,) = watched(BEGUN, *ready(0, 10.0), stats(0, 40.0, 300, num_places=0)).now(1).replicas
    assert (look.prompt_tokens_per_s, look.kv_use) == (10.0, None)


def test_units_in_hand_are_those_leased_and_neither_committed_nor_failed() -> None:
    leases = [event(1.0, "unit_leased", replica=0, unit=name) for name in "abcd"]
    watch = watched(
        BEGUN, *ready(0), *leases, committed(2.0, "a"), event(3.0, "unit_failed", replica=0, unit="b", error="x")
    )
    assert watch.now(1).num_units_in_flight == 2


def test_the_dead_are_told_of_and_those_that_were_not_needed_are_not() -> None:
    watch = watched(
        BEGUN,
        *ready(0),
        *ready(1),
        event(5.0, "replica_died", replica=0, error="its process ended"),
        event(6.0, "replica_stopped", replica=1, error=""),
    )
    (dead,) = watch.now(1).replicas
    assert (dead.replica_id, dead.state, dead.node, dead.error) == (0, "dead", "node-a", "its process ended")


def test_a_run_that_stops_has_replicas_that_drain() -> None:
    watch = watched(
        BEGUN, *ready(0), event(1.0, "replica_starting", replica=1), event(2.0, "run_stopped", reason="signal")
    )
    assert [look.state for look in watch.now(1).replicas] == ["draining", "starting"]


def test_the_time_left_comes_from_commits_while_replicas_were_ready() -> None:
    commits = [committed(100.0 + second, f"unit-{second}") for second in range(5, 125, 5)]
    now = watched(BEGUN, *ready(0, 100.0), *commits).now(600)
    assert now.eta_s == pytest.approx(300.0, rel=0.1)
    assert now.eta_low_s is not None
    assert now.eta_high_s is not None
    assert now.eta_low_s <= now.eta_s <= now.eta_high_s
    assert now.num_rows_committed == 240


def test_an_open_end_of_the_range_is_no_number_json_lacks() -> None:
    bursts = [committed(100.0 + second, f"unit-{second}", num_rows=second**2) for second in range(1, 62, 12)]
    now = watched(BEGUN, *ready(0, 100.0), *bursts).now(10_000)
    assert now.eta_low_s is not None
    assert now.eta_high_s is None
    assert now.eta_range_s == (now.eta_low_s, float("inf"))
    json.dumps(asdict(now), allow_nan=False)


def test_a_new_run_begins_with_nothing_but_the_dead_letters_of_the_output() -> None:
    watch = watched(
        BEGUN,
        *ready(0),
        committed(1.0, "a", too_long=2, empty=1),
        event(9.0, "run_started", run="run-2"),
    )
    assert watch.now(5) == RunNow("run-2")
    assert watch.dead_letters_by_type() == {"too_long": 2, "empty": 1}


def test_a_retried_unit_counts_as_its_last_commit_left_it() -> None:
    watch = watched(
        BEGUN,
        *ready(0),
        committed(1.0, "a", too_long=2),
        committed(2.0, "b", too_long=1),
        event(9.0, "run_started", run="run-2"),
        committed(10.0, "a", empty=1),
        committed(11.0, "b"),
    )
    assert watch.dead_letters_by_type() == {"empty": 1}


def test_torn_and_foreign_events_do_no_harm() -> None:
    odd: list[Event] = [
        {"event": "replica_stats"},
        {"at": "soon", "event": "unit_committed"},
        event(1.0, "replica_ready", replica=9),
        event(1.0, "replica_stats", replica="x", idle_s="y"),
        event(2.0, "unit_committed", unit="a", num_rows=None, dead_letters_by_type={"x": "y"}),
        event(3.0, "something_new", replica=0),
    ]
    watch = watched(*odd, BEGUN, *odd)
    assert watch.now(1) == RunNow("run-1")
    assert watch.dead_letters_by_type() == {}


def test_status_tells_of_the_holders_run_and_of_no_other(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    publish(output, plan, plan.units[0], dead=[4])
    log = output.child("_job/runs/run-1.jsonl")
    log.append(b"".join(json.dumps(it).encode() + b"\n" for it in (BEGUN, *ready(0), stats(0, 30.0, 300))))
    assert read_status(str(output)).run_now is None
    for run_id, is_told in (("run-1", True), ("run-2", False)):
        beat = datetime.now(UTC).isoformat()
        lease = LeaseRecord(run_id, 1, beat, beat, 60.0, Process("gpu-17", 4242, "99", "another boot", "pid:[1]"))
        output.child("_job/lease.json").write_replace(json.dumps(asdict(lease)).encode(), staging(output))
        now = read_status(str(output)).run_now
        assert (now is not None) == is_told
    json.dumps(read_status(str(output)).as_json(), allow_nan=False)
