"""The lease is held while the block lasts, its loss is noticed, and a run without a job leaves nothing behind."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.cluster import lease_keeper
from batchinfer.cluster.lease_keeper import LeaseKeeper, new_run_id
from batchinfer.errors import LeaseHeld, LeaseLost, StorageUnavailable
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import lease_file, write_job
from batchinfer.storage.lease import Lease, Process, read_lease, take_over
from batchinfer.storage.location import Location
from tests.outputs import memory_uri

#: A beat every hundredth of a second.
TIMEOUT_S = 0.01 * lease_keeper.BEATS_PER_TIMEOUT


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri())


@pytest.fixture
def beaten(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released after every heartbeat, whatever came of it."""
    count = threading.Semaphore(0)
    heartbeat = Lease.heartbeat

    def counted(lease: Lease) -> None:
        try:
            heartbeat(lease)
        finally:
            count.release()

    monkeypatch.setattr(Lease, "heartbeat", counted)
    return count


def test_run_ids_sort_by_start_and_differ() -> None:
    first, second = new_run_id(), new_run_id()
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", first)
    assert first != second
    assert first[:15] <= second[:15]


def test_a_second_run_is_refused_and_told_who_holds_the_output(output: Location) -> None:
    with LeaseKeeper(output, 60.0) as held:
        with pytest.raises(LeaseHeld, match=rf"held by run {held.run_id} \(host .*, process \d+"):
            LeaseKeeper(output, 60.0)
        held.check()


def test_the_next_run_may_start_when_the_block_has_ended(output: Location) -> None:
    with LeaseKeeper(output, 60.0):
        pass
    with LeaseKeeper(output, 60.0) as second:
        second.check()


def test_the_lease_beats_while_the_block_lasts(output: Location, beaten: threading.Semaphore) -> None:
    with LeaseKeeper(output, TIMEOUT_S) as held:
        record = read_lease(output)
        assert record is not None
        for _ in range(2):
            assert beaten.acquire(timeout=10)
        later = read_lease(output)
        assert later is not None
        assert later.heartbeat_at > record.heartbeat_at
        assert later.run_id == held.run_id


def test_a_lost_lease_is_noticed_and_the_winners_is_left_alone(output: Location, beaten: threading.Semaphore) -> None:
    with LeaseKeeper(output, TIMEOUT_S) as held:
        record = read_lease(output)
        assert record is not None
        winner = replace(record, run_id="winner", epoch=2, process=Process("gpu-17", 1, "1", "boot", "pid:[1]"))
        content = json.loads(json.dumps(winner, default=lambda it: {name: getattr(it, name) for name in it.__slots__}))
        # A heartbeat under way may write over the winner once; its next one would notice, as this write does.
        while held._thread.is_alive():
            lease_file(output).write_replace(json.dumps(content).encode(), output.child("_job/tmp"))
            assert beaten.acquire(timeout=10)
            held._thread.join(0.05)
        with pytest.raises(LeaseLost, match="taken over by run winner"):
            held.check()
    left = read_lease(output)
    assert left is not None
    assert left.run_id == "winner"


def test_a_heartbeat_that_storage_refuses_is_logged_and_the_next_one_tried(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Semaphore(0)

    def refused(lease: Lease) -> None:
        tried.release()
        raise StorageUnavailable("503")

    monkeypatch.setattr(Lease, "heartbeat", refused)
    with LeaseKeeper(output, TIMEOUT_S) as held:
        for _ in range(3):
            assert tried.acquire(timeout=10)
        held.check()
    assert "heartbeat failed: 503" in caplog.text


def test_a_run_that_ends_before_it_wrote_a_job_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with LeaseKeeper(locate(str(output)), 60.0):
        assert (output / "_job" / "lease.json").exists()
    assert not output.exists()


def test_a_run_that_wrote_a_job_leaves_it_and_no_lease(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with LeaseKeeper(locate(str(output)), 60.0):
        write_job(locate(str(output)), {"name": "job"})
    assert {path.name for path in (output / "_job").iterdir()} - {"tmp"} == {"job.json"}


def test_the_block_ends_without_waiting_for_the_next_beat(output: Location) -> None:
    keeper = LeaseKeeper(output, 10_000.0)
    with keeper:
        pass
    assert not keeper._thread.is_alive()


def test_a_run_that_was_stopped_for_longer_than_its_lease_looks_again_before_it_goes_on(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beating thread wakes no sooner than its loop, so the loop must not rely on it."""
    now_s = [1000.0]
    monkeypatch.setattr(lease_keeper, "_now_s", lambda: now_s[0])
    keeper = LeaseKeeper(output, 60.0)
    keeper.check()
    with LeaseKeeper(output, 60.0, acquire=take_over) as winner:
        now_s[0] += 59.0
        keeper.check()
        now_s[0] += 2.0
        with pytest.raises(LeaseLost, match=f"taken over by run {winner.run_id}"):
            keeper.check()
        winner.check()


def test_a_run_that_cannot_look_goes_on_and_looks_no_oftener_than_it_beats(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may do by then is what any zombie may do; commits are single by themselves."""
    looks = []

    def refused(lease: Lease) -> None:
        looks.append(lease)
        raise StorageUnavailable("503")

    now_s = [1000.0]
    monkeypatch.setattr(lease_keeper, "_now_s", lambda: now_s[0])
    keeper = LeaseKeeper(output, 60.0)
    monkeypatch.setattr(Lease, "heartbeat", refused)
    now_s[0] += 61.0
    for _ in range(5):
        keeper.check()
    assert len(looks) == 1
    now_s[0] += 60.0 / lease_keeper.BEATS_PER_TIMEOUT + 1.0
    keeper.check()
    assert len(looks) == 2


def test_a_lease_that_cannot_be_released_is_a_warning(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the run came to has been said already."""

    def refused(lease: Lease) -> None:
        raise StorageUnavailable("503")

    monkeypatch.setattr(Lease, "release", refused)
    with LeaseKeeper(output, 60.0):
        pass
    assert "not released: 503; it goes stale after 60 s" in caplog.text
