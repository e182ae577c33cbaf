"""The lease: one holder, honest refusals, takeover of what is dead, and no second winner in any order of steps."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.errors import LeaseHeld, LeaseLost, OutputError
from batchinfer.storage import lease as lease_module
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import lease_file, staging
from batchinfer.storage.lease import Lease, LeaseRecord, Process, acquire, take_over
from batchinfer.storage.location import Location
from tests.outputs import memory_uri

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class HandClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri())


def elsewhere(run_id: str = "other", *, silent_s: float = 0.0, epoch: int = 1, timeout_s: float = 60.0) -> LeaseRecord:
    """A lease held by a process on another machine, last heard of ``silent_s`` before START."""
    beat = (START - timedelta(seconds=silent_s)).isoformat()
    process = Process("gpu-17", 4242, "99", "another boot", "pid:[1]")
    return LeaseRecord(run_id, epoch, "2026-01-01T00:00:00+00:00", beat, timeout_s, process)


def write(place: Location, record: LeaseRecord, output: Location) -> None:
    place.write_replace(lease_module._encoded(record), staging(output))


def held(output: Location) -> dict[str, object]:
    return dict(json.loads(lease_file(output).read_bytes()))


def job_files(output: Location) -> set[str]:
    return output.child("_job").names() - {"tmp"}


def test_a_free_output_is_held_then_released(output: Location, clock: HandClock) -> None:
    lease = acquire(output, "run-1", 60, clock)
    record = held(output)
    assert (record["run_id"], record["epoch"], record["heartbeat_at"]) == ("run-1", 1, START.isoformat())
    process = record["process"]
    assert isinstance(process, dict)
    assert process["pid"] == os.getpid()
    lease.release()
    assert job_files(output) == set()


def test_a_live_lease_is_refused_naming_who_holds_it(output: Location, clock: HandClock) -> None:
    write(lease_file(output), elsewhere(silent_s=59), output)
    with pytest.raises(LeaseHeld) as caught:
        acquire(output, "run-1", 60, clock)
    assert "held by run other (host gpu-17, process 4242, started 2026-01-01T00:00:00+00:00," in str(caught.value)
    assert "last heartbeat 2026-01-02T03:03:06+00:00)" in str(caught.value)
    assert held(output)["run_id"] == "other"


def test_a_second_run_of_the_same_process_is_refused(output: Location, clock: HandClock) -> None:
    acquire(output, "run-1", 60, clock)
    with pytest.raises(LeaseHeld, match="run run-1"):
        acquire(output, "run-2", 60, clock)


def test_a_heartbeat_keeps_the_lease_and_silence_loses_it(output: Location, clock: HandClock) -> None:
    """1. beats reach far beyond the timeout; 2. silence; 3. another run takes over; 4. the next beat says so."""
    lease = acquire(output, "run-1", 60, clock)
    # The holder is this very process; pretend it is on another machine, or only its death would count.
    lease.record = replace(lease.record, process=elsewhere().process)
    write(lease_file(output), lease.record, output)
    for _ in range(5):
        clock.move(50)
        lease.heartbeat()
        with pytest.raises(LeaseHeld):
            acquire(output, "run-2", 60, clock)
    clock.move(61)
    second = acquire(output, "run-2", 60, clock)
    assert (second.record.run_id, second.record.epoch) == ("run-2", 2)
    with pytest.raises(LeaseLost, match="taken over by run run-2"):
        lease.heartbeat()
    lease.release()
    second.heartbeat()
    assert held(output)["run_id"] == "run-2"
    assert job_files(output) == {"lease.json"}


def test_the_holders_timeout_decides_not_the_candidates(output: Location, clock: HandClock) -> None:
    write(lease_file(output), elsewhere(silent_s=100, timeout_s=300), output)
    with pytest.raises(LeaseHeld):
        acquire(output, "run-1", 10, clock)


def test_a_lease_whose_process_has_died_on_this_machine_is_taken_over_at_once(
    output: Location, clock: HandClock
) -> None:
    script = "from batchinfer.storage.lease import Process; print(repr(Process.current()))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    gone = eval(printed, {"Process": Process})
    assert gone.is_gone(Process.current())
    write(lease_file(output), replace(elsewhere(), process=gone), output)
    assert acquire(output, "run-1", 60, clock).record.epoch == 2


def test_what_cannot_be_seen_from_here_is_not_called_dead() -> None:
    me = Process.current()
    assert not me.is_gone(me)
    recycled = replace(me, start_time="1")
    assert recycled.is_gone(me)
    assert not replace(recycled, host="another").is_gone(me)
    assert not replace(recycled, boot_id="before the reboot").is_gone(me)
    assert not replace(recycled, pid_namespace="pid:[1]").is_gone(me)
    assert not recycled.is_gone(replace(me, boot_id=""))


def test_a_removed_lease_is_lost(output: Location, clock: HandClock) -> None:
    lease = acquire(output, "run-1", 60, clock)
    lease_file(output).remove()
    with pytest.raises(LeaseLost, match="was removed"):
        lease.heartbeat()


def test_an_unreadable_lease_names_the_file_and_the_way_out(output: Location, clock: HandClock) -> None:
    lease_file(output).write_replace(b'{"run_id": "x"}', staging(output))
    with pytest.raises(OutputError, match=r"lease\.json: no lease .*remove the file if no run is using the output"):
        acquire(output, "run-1", 60, clock)


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_eight_candidates_one_holds_the_output(tmp_path: Path, stale: bool) -> None:
    for round_number in range(10):
        output = locate(str(tmp_path / str(round_number)))
        clock = HandClock()
        if stale:
            write(lease_file(output), elsewhere(silent_s=61), output)
        start = threading.Barrier(8)
        winners: list[Lease] = []

        def candidate(number: int, output: Location = output, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                winners.append(acquire(output, f"run-{number}", 60, clock))  # noqa: B023 - joined in the round
            except LeaseHeld:
                return

        threads = [threading.Thread(target=candidate, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        winners[0].heartbeat()
        assert held(output)["run_id"] == winners[0].record.run_id
        assert job_files(output) == {"lease.json"}


def test_a_claim_left_by_a_crashed_candidate_goes_stale_too(output: Location, clock: HandClock) -> None:
    """1. lease stale; 2. a candidate claims epoch 2 and dies; 3. while its claim is fresh others wait; 4. then not."""
    write(lease_file(output), elsewhere(silent_s=61), output)
    write(output.child("_job/lease-claim-2.json"), elsewhere("claimant", epoch=2), output)
    with pytest.raises(LeaseHeld, match="run claimant"):
        acquire(output, "run-1", 60, clock)
    clock.move(61)
    assert acquire(output, "run-1", 60, clock).record.epoch == 3
    assert job_files(output) == {"lease.json"}


def after_first_look(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Let something happen right after the candidate has read the lease for the first time."""
    read = lease_module._read
    pending = [happens]

    def reading(place: Location) -> LeaseRecord | None:
        record = read(place)
        if pending:
            pending.pop()()
        return record

    monkeypatch.setattr(lease_module, "_read", reading)


def test_a_slow_candidate_does_not_undo_a_finished_takeover(
    output: Location, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. slow reads the stale lease; 2. fast takes over and removes its claim; 3. slow claims the same epoch."""
    write(lease_file(output), elsewhere(silent_s=61), output)
    fast: list[Lease] = []
    after_first_look(monkeypatch, lambda: fast.append(acquire(output, "fast", 60, clock)))
    with pytest.raises(LeaseHeld, match="run fast"):
        acquire(output, "slow", 60, clock)
    fast[0].heartbeat()
    assert job_files(output) == {"lease.json"}


def test_a_lease_released_while_we_look_is_taken_fresh(
    output: Location, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(lease_file(output), elsewhere(silent_s=61), output)
    after_first_look(monkeypatch, lease_file(output).remove)
    assert acquire(output, "run-1", 60, clock).record.run_id == "run-1"
    assert held(output)["run_id"] == "run-1"


def test_our_own_create_whose_answer_was_lost_is_recognised(
    output: Location, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = LeaseRecord("run-1", 1, START.isoformat(), START.isoformat(), 60, Process.current())
    after_first_look(monkeypatch, lambda: write(lease_file(output), ours, output))
    assert acquire(output, "run-1", 60, clock).record == ours


def test_a_live_lease_is_taken_over_by_a_run_that_was_told_to(output: Location, clock: HandClock) -> None:
    first = acquire(output, "first", 60.0, clock)
    second = take_over(output, "second", 60.0, clock)
    assert (second.record.run_id, second.record.epoch) == ("second", 2)
    with pytest.raises(LeaseLost, match="taken over by run second"):
        first.heartbeat()
    first.release()
    second.heartbeat()
    second.release()
    assert job_files(output) == set()


def test_a_takeover_of_a_free_output_is_an_ordinary_start(output: Location, clock: HandClock) -> None:
    assert take_over(output, "only", 60.0, clock).record.epoch == 1


def test_a_takeover_does_not_wait_for_a_candidate_that_is_stuck(output: Location, clock: HandClock) -> None:
    """A live claim keeps others from taking a stale lease over, but not one that was told to."""
    write(lease_file(output), elsewhere("stale", silent_s=100.0), output)
    write(output.child("_job/lease-claim-2.json"), elsewhere("stuck", epoch=2), output)
    with pytest.raises(LeaseHeld, match="held by run stuck"):
        acquire(output, "polite", 60.0, clock)
    taken = take_over(output, "told", 60.0, clock)
    assert (taken.record.run_id, taken.record.epoch) == ("told", 3)
    assert job_files(output) == {"lease.json"}


def test_of_takeovers_at_once_one_holds_the_output_in_the_end(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"))
    acquire(output, "first", 60.0)
    start = threading.Barrier(4)
    taken: list[Lease] = []

    def candidate(number: int) -> None:
        start.wait()
        with contextlib.suppress(LeaseHeld):
            taken.append(take_over(output, f"run-{number}", 60.0))

    threads = [threading.Thread(target=candidate, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = []
    for lease in taken:
        with contextlib.suppress(LeaseLost):
            lease.heartbeat()
            holders.append(lease.record.run_id)
    assert len(holders) == 1
    assert "lease.json" in job_files(output)
