"""What `chaos` decides, carried out: errors are retried, deaths are noted first, only one's own lease is stolen."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchinfer.chaos import CallFaults, Chaos, ChaosSpec
from batchinfer.errors import LeaseHeld, LeaseLost, OutputError, StorageUnavailable
from batchinfer.storage.chaos_faults import (
    CHAOS,
    NOBODY,
    ChaosFaults,
    ChaosPlan,
    ProcessNote,
    read_notes,
    remove_notes,
    steal_lease,
)
from batchinfer.storage.failures import RetryPolicy, attempt
from batchinfer.storage.faults import FaultPlan, StorageFaults
from batchinfer.storage.filesystem import locate
from batchinfer.storage.lease import acquire, read_lease
from batchinfer.storage.location import Location
from tests.outputs import memory_uri


class Died(BaseException):
    """Stands for SIGKILL."""


class Scripted(Chaos):
    """Decisions by hand: call number -> faults."""

    def __init__(self, script: Mapping[int, CallFaults]) -> None:
        super().__init__(ChaosSpec(), seed=0, run_number=7)
        object.__setattr__(self, "script", script)

    def of_call(self, role: str, number: int) -> CallFaults:
        script: Mapping[int, CallFaults] = object.__getattribute__(self, "script")
        return script.get(number, CallFaults())


def die() -> None:
    raise Died


def faults_of(
    output: Location, script: Mapping[int, CallFaults], role: str = "replica-2", sleep: Callable[[float], None] = print
) -> ChaosFaults:
    return ChaosFaults(Scripted(script), role, output, lambda: 42, sleep=sleep, end_process=die)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri())


def with_faults(output: Location, faults: StorageFaults, max_attempts: int = 3) -> Location:
    """The same place, its calls disturbed."""
    return locate(output.uri, policy=RetryPolicy(max_attempts, 0.0, 0.0, faults))


def test_an_error_before_or_after_the_call_is_tried_again(output: Location) -> None:
    faults = faults_of(output, {0: CallFaults(fail="before", error=0), 1: CallFaults(fail="after", error=2)})
    place = with_faults(output, faults)
    place.child("a.bin").write_replace(b"new", place.child("_job/tmp"))
    assert output.child("a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("error", range(4))
def test_errors_that_outlast_the_retries_end_as_storage_unavailable(output: Location, error: int) -> None:
    faults = faults_of(output, {number: CallFaults(fail="before", error=error) for number in range(3)})
    with pytest.raises(StorageUnavailable, match=r"still failing after 3 attempts .*injected by --chaos"):
        with_faults(output, faults).child("a.bin").read_bytes()


def test_a_delay_is_slept_before_the_call(output: Location) -> None:
    slept: list[float] = []
    place = with_faults(output, faults_of(output, {1: CallFaults(delay_s=0.25)}, sleep=slept.append))
    assert place.child("a.bin").read_if_present() is None
    assert slept == []
    assert place.child("a.bin").read_if_present() is None
    assert slept == [0.25]


@pytest.mark.parametrize(("moment", "is_there"), [("before", False), ("after", True)])
def test_a_death_is_noted_and_comes_at_its_moment(output: Location, moment: str, is_there: bool) -> None:
    place = with_faults(output, faults_of(output, {0: CallFaults(kill=moment)}))  # type: ignore[arg-type]
    with pytest.raises(Died):
        place.child("a.bin").create_exclusive(b"new", place.child("_job/tmp"))
    assert output.child("a.bin").is_file() == is_there
    assert read_notes(output) == [ProcessNote(7, "replica-2", 42, f"{moment} create_exclusive, call 0")]
    remove_notes(output)
    assert read_notes(output) == []


def test_a_torn_write_leaves_half_of_the_bytes_in_staging_and_none_under_the_name(tmp_path: Path) -> None:
    output = locate(str(tmp_path))
    place = with_faults(output, faults_of(output, {0: CallFaults(kill="halfway")}))
    with pytest.raises(Died):
        place.child("a.bin").write_replace(b"0123456789", place.child("_job/tmp"))
    assert not (tmp_path / "a.bin").exists()
    (torn,) = (path for path in (tmp_path / "_job/tmp").iterdir() if path.name.startswith("a.bin"))
    assert torn.read_bytes() == b"01234"


def test_a_torn_append_leaves_half_a_line_behind_whole_ones(tmp_path: Path) -> None:
    output = locate(str(tmp_path))
    place = with_faults(output, faults_of(output, {1: CallFaults(kill="halfway")})).child("log")
    place.append(b"first\n")
    with pytest.raises(Died):
        place.append(b"second\n")
    assert (tmp_path / "log").read_bytes() == b"first\nsec"


def test_an_append_whose_answer_was_lost_is_not_doubled(tmp_path: Path) -> None:
    output = locate(str(tmp_path))
    place = with_faults(output, faults_of(output, {1: CallFaults(fail="after")})).child("log")
    place.append(b"first\n")
    place.append(b"second\n")
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


def test_a_replica_notes_what_it_has_generated_with_each_write(output: Location) -> None:
    place = with_faults(output, faults_of(output, {}))
    place.child("a.bin").read_if_present()
    assert read_notes(output) == []
    place.child("a.bin").write_replace(b"new", place.child("_job/tmp"))
    assert read_notes(output) == [ProcessNote(7, "replica-2", 42)]


def test_the_lease_of_this_process_is_stolen_and_the_next_run_takes_it_over(output: Location) -> None:
    lease = acquire(output, "run-1", 60)
    place = with_faults(output, faults_of(output, {0: CallFaults(expire_lease=True)}, role="driver"))
    place.child("a.bin").read_if_present()
    with pytest.raises(LeaseLost, match=NOBODY):
        lease.heartbeat()
    taken = acquire(output, "run-2", 60)
    assert taken.record.epoch == 3


def test_the_lease_of_another_process_is_left_alone(output: Location) -> None:
    acquire(output, "theirs", 60)
    written = json.loads(output.child("_job/lease.json").read_bytes())
    written["process"]["host"] = "elsewhere"
    output.child("_job/lease.json").write_replace(json.dumps(written).encode(), output.child("_job/tmp"))
    steal_lease(output)
    assert read_lease(output) is not None
    with pytest.raises(LeaseHeld, match="theirs"):
        acquire(output, "run-2", 60, lambda: datetime.now(UTC))


def test_faults_that_cannot_note_anything_break_storage_all_the_same(
    output: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = faults_of(output, {0: CallFaults(kill="before")})

    def full(self: Location, content: bytes, staging: Location) -> None:
        raise StorageUnavailable("no space left")

    monkeypatch.setattr(type(output), "write_replace", full)
    with pytest.raises(Died):
        attempt("read_bytes", lambda: None, "a", OutputError, RetryPolicy(faults=faults))
    assert "cannot note what it does" in caplog.text


def test_the_plan_that_travels_makes_the_faults_of_a_role(output: Location) -> None:
    output.child("a.bin").write_replace(b"there", output.child("_job/tmp"))
    plan: FaultPlan = ChaosPlan(Chaos(ChaosSpec(fail=1.0), 0, 0), output.uri, {})
    with pytest.raises(StorageUnavailable):
        with_faults(output, plan.of("replica-0", lambda: 0)).child("a.bin").read_bytes()
    assert output.child(CHAOS).names() == set()
