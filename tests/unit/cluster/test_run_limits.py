"""Runs that end before their work is done: for quality, at a deadline, out of GPU hours. And the runs after them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.cluster.allowance import LEAVE_S
from batchinfer.cluster.driver import OutputWork, drive
from batchinfer.cluster.messages import Assignment, Drained, RetryScope
from batchinfer.cluster.prepare import Preparation, Retry, prepare
from batchinfer.cluster.run_limits import RunLimits
from batchinfer.errors import AllowanceSpent, PoorQuality
from batchinfer.records import UnitResult
from batchinfer.storage.events import open_event_log, read_events
from tests.jobs import fake_job, model_without_weights, write_input
from tests.scripted_replicas import run_scripted

#: Ten units of four rows.
NUM_UNITS = 10
Prepare = Callable[..., Preparation]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    model = model_without_weights(tmp_path / "model")
    rows = write_input(tmp_path / "in", [4 * NUM_UNITS])

    def prepared(execution: dict[str, object] | None = None, **quality: object) -> Preparation:
        execution = {"rows_per_unit": 4, **(execution or {})}
        return prepare(fake_job(model, rows, tmp_path / "out", execution=execution, quality=quality))

    return prepared


def result(assignment: Assignment | None, **quality: int) -> UnitResult:
    assert assignment is not None
    return UnitResult(assignment.unit.unit_id, 4, 4, 0, 4, 4, 0.0, quality=quality)


def stops(preparation: Preparation) -> list[object]:
    return [event["reason"] for event in read_events(preparation.output, ["run_stopped"])]


def test_poor_quality_drains_the_run_and_names_measure_share_and_ways_out(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepare
) -> None:
    """The replica holds all ten units; the second commit is what there is to judge by, the others are journaled."""
    preparation = prepared(max_repeating=0.5, min_rows=8)

    def generate(_: int, assignment: Assignment | None) -> UnitResult | None:
        assert assignment is not None
        return result(assignment, repeating=3, truncated=4) if assignment.unit.first_row < 8 else None

    scripts = {"generate": generate, "drain": lambda _, assignment: Drained(7, 90)}
    with pytest.raises(PoorQuality) as raised:
        run_scripted(monkeypatch, preparation, scripts)
    text = str(raised.value)
    assert "quality.max_repeating: " in text
    assert "6 of the last 8 completions end in a loop (75.0%, the limit is 50.0%)" in text
    assert "another output.path, or, if these are right, raise quality.max_repeating" in text
    assert "8 of 40 rows are committed, 7 rows and 90 tokens of others are journaled" in text
    assert raised.value.exit_code == 2
    assert stops(preparation) == ["quality"]


def test_the_canary_does_not_hold_anybody_up(monkeypatch: pytest.MonkeyPatch, prepared: Prepare) -> None:
    """Limits that are not passed change nothing, and neither do bad units before enough rows are committed."""
    preparation = prepared(max_empty=0.2, min_rows=40)
    first = True

    def generate(_: int, assignment: Assignment | None) -> UnitResult:
        nonlocal first
        was_first, first = first, False
        return result(assignment, empty=4 if was_first else 0)

    assert run_scripted(monkeypatch, preparation, {"generate": generate}).outcome == "complete"


def test_a_job_whose_last_unit_passes_a_limit_ends_with_it_too(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepare
) -> None:
    preparation = prepared(max_empty=0.2, min_rows=40)
    with pytest.raises(PoorQuality, match=r"40 of the last 40 completions are empty \(100"):
        run_scripted(monkeypatch, preparation, {"generate": lambda _, assignment: result(assignment, empty=4)})


def test_a_retry_of_dead_letters_is_not_judged_by_what_the_run_committed(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepare
) -> None:
    preparation = prepared(max_empty=0.2, min_rows=8)
    with pytest.raises(PoorQuality):
        run_scripted(monkeypatch, preparation, {"generate": lambda _, assignment: result(assignment, empty=4)})
    # The scripted replicas publish no parts; what counts is which units are not pending.
    done = replace(preparation, pending=())
    with pytest.raises(PoorQuality):
        RunLimits(done).check()
    scope = RetryScope((), "retry")
    RunLimits(replace(done, retry=Retry(scope, preparation.fingerprint, {}, 0, ()))).check()


def test_a_unit_told_of_twice_counts_once(prepared: Prepare) -> None:
    limits = RunLimits(prepared(max_empty=0.5, min_rows=4))
    good, bad = (UnitResult(name, 4, 4, 0, 4, 4, 0.0, quality=quality) for name, quality in
                 (("good", {}), ("bad", {"empty": 4})))  # fmt: skip
    for each in (good, bad, bad, bad):
        limits.unit_committed(each)
    assert limits.reached() is None


def test_the_deadline_drains_the_run_and_tells_what_is_left(monkeypatch: pytest.MonkeyPatch, prepared: Prepare) -> None:
    preparation = prepared({"deadline": "10s"})
    scripts = {"generate": lambda _, assignment: None, "drain": lambda _, assignment: Drained(3, 50)}
    with pytest.raises(AllowanceSpent) as raised:
        run_scripted(monkeypatch, preparation, scripts)
    text = str(raised.value)
    assert (
        "0 of 40 rows are committed, 3 rows and 50 tokens of others are journaled; execution.deadline is here" in text
    )
    assert "40 rows are left" in text
    assert "run the same command again with a later execution.deadline" in text
    assert raised.value.exit_code == 3
    assert stops(preparation) == ["deadline"]


def test_gpu_hours_are_those_of_all_runs_and_a_spent_budget_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepare
) -> None:
    """1. a run is drained  2. the same limits start nothing  3. a larger budget goes on to the end."""
    budget = 12 / 3600
    preparation = prepared({"max_gpu_hours": budget})
    ticks = iter(range(10**6))
    began_at = datetime(2026, 11, 23, 22, tzinfo=UTC)
    # Every look at the clock is a quarter of a second later: no test should wait for hours to pass.
    monkeypatch.setattr(
        "tests.scripted_replicas.RunLimits",
        lambda it: RunLimits(it, lambda: began_at + timedelta(seconds=next(ticks) / 4)),
    )
    with pytest.raises(AllowanceSpent, match=r"execution.max_gpu_hours 0.00333333 leave no more"):
        run_scripted(monkeypatch, preparation, {"generate": lambda _, assignment: None})
    assert stops(preparation) == ["gpu_hours"]

    again = prepared({"max_gpu_hours": 1e-3})
    with pytest.raises(AllowanceSpent, match=r"nothing was started: .*; 40 rows are left; raise execution.max_gpu"):
        RunLimits(again).check()
    monkeypatch.undo()
    enough = prepared({"max_gpu_hours": 1.0})
    RunLimits(enough).check()
    finished = run_scripted(monkeypatch, enough, {"generate": lambda _, assignment: result(assignment)})
    assert finished.outcome == "complete"


def test_what_earlier_runs_used_is_added_to_what_this_one_uses(prepared: Prepare) -> None:
    """1. a run has used 1,000 s  2. the next one may use 25 s  3. it holds a GPU since 4 s  4. and since 16 s."""
    now = [datetime(2026, 11, 23, 22, tzinfo=UTC)]
    preparation = prepared({"max_gpu_hours": (1000 + LEAVE_S + 15) / 3600})
    log = open_event_log(preparation.output, "20260101T000000-000000")
    log.add("run_started", now[0] - timedelta(seconds=5000), run="20260101T000000-000000")
    log.add("replica_starting", now[0] - timedelta(seconds=4100), replica=0, num_gpus=1)
    log.add("replica_ready", now[0] - timedelta(seconds=4000), replica=0, start_s=0.0)
    log.add("replica_drained", now[0] - timedelta(seconds=3000), replica=0)
    log.close()
    limits = RunLimits(preparation, lambda: now[0])
    limits.check()
    limits.replica_starting(0, 1.0)
    limits.replica_ready(0, 4.0)
    assert limits.reached() is None
    now[0] += timedelta(seconds=12)
    assert limits.reached() == "gpu_hours"


def test_a_deadline_that_is_over_starts_nothing_and_writes_nothing(prepared: Prepare, tmp_path: Path) -> None:
    preparation = prepared({"deadline": "2026-01-01T00:00:00Z"})
    with pytest.raises(AllowanceSpent, match=r"nothing was started: execution.deadline is here.*40 rows are left"):
        drive(OutputWork(lambda policy: preparation, lambda found: found))
    assert not (tmp_path / "out").exists()


def test_a_finished_output_needs_no_allowance(prepared: Prepare) -> None:
    preparation = prepared({"deadline": "2026-01-01T00:00:00Z", "max_gpu_hours": 1e-9})
    RunLimits(replace(preparation, pending=())).check()
