"""Run events: every line whole or left out, on storage with append and without."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.storage.events import SEGMENT_INTERVAL_S, Event, open_event_log, read_events
from batchinfer.storage.filesystem import locate
from batchinfer.storage.location import Location
from tests.outputs import memory_uri


class HandClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri())


def names(events: list[Event]) -> list[object]:
    return [event["event"] for event in events]


def test_events_read_back_run_by_run_in_order(output: Location) -> None:
    clock = HandClock()
    for run_id in ("20260102-b", "20260101-a"):
        log = open_event_log(output, run_id, clock)
        log.write("run_started", run=run_id, replicas=[1, 2], note="시작")
        clock.move(SEGMENT_INTERVAL_S + 1)
        log.write("unit_committed", unit="u")
        log.close()
        log.close()
    events = list(read_events(output))
    assert [event.get("run") for event in events] == ["20260101-a", None, "20260102-b", None]
    assert events[2] == {
        "at": "2026-01-02T03:04:05+00:00",
        "event": "run_started",
        "run": "20260102-b",
        "replicas": [1, 2],
        "note": "시작",
    }


def test_an_output_without_runs_has_no_events(output: Location) -> None:
    assert list(read_events(output)) == []


def test_locally_an_event_is_there_when_write_returns(tmp_path: Path) -> None:
    output = locate(str(tmp_path))
    open_event_log(output, "run").write("first")
    assert names(list(read_events(output))) == ["first"]


def test_an_object_store_gets_a_segment_every_few_seconds_and_the_rest_at_close() -> None:
    output, clock = locate(memory_uri()), HandClock()
    log = open_event_log(output, "run", clock)
    log.write("a")
    log.write("b")
    assert list(read_events(output)) == []
    clock.move(SEGMENT_INTERVAL_S)
    log.write("c")
    assert names(list(read_events(output))) == ["a", "b", "c"]
    log.write("d")
    log.close()
    assert names(list(read_events(output))) == ["a", "b", "c", "d"]
    assert output.child("_job/runs").names() == {"run-000000.jsonl", "run-000001.jsonl"}


def test_a_line_torn_by_a_crash_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    output = locate(str(tmp_path))
    log = open_event_log(output, "run-1")
    log.write("a")
    output.child("_job/runs/run-1.jsonl").append(b'{"at": "2026-01-02T03:04')
    open_event_log(output, "run-2").write("b")
    assert names(list(read_events(output))) == ["a", "b"]


def test_lines_of_several_threads_do_not_mix(output: Location) -> None:
    log = open_event_log(output, "run")

    def write(lane: int) -> None:
        for number in range(50):
            log.write("e", lane=lane, number=number)

    threads = [threading.Thread(target=write, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(read_events(output))
    assert len(events) == 200
    for lane in range(4):
        assert [event["number"] for event in events if event["lane"] == lane] == list(range(50))


def test_events_of_some_kinds_are_read_without_the_others(output: Location) -> None:
    """A line that only speaks of a kind in its text is not of it."""
    log = open_event_log(output, "20260101-a")
    for kind in ("run_started", "unit_leased", "unit_committed", "unit_failed", "unit_committed"):
        log.add(kind, error='"event": "unit_committed"')
    log.close()
    assert names(list(read_events(output, ["run_started", "unit_committed"]))) == [
        "run_started",
        "unit_committed",
        "unit_committed",
    ]
