"""When a deadline or a budget of GPU hours ends a run, and how GPU hours are counted."""

from datetime import UTC, datetime, timedelta

import pytest

from batchinfer.cluster.allowance import (
    LEAVE_S,
    Allowance,
    GpuMeter,
    Use,
    left_text,
    spent_text,
    use_of_earlier_runs,
)
from batchinfer.storage.events import Event

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_a_run_drains_early_enough_to_be_gone_at_its_deadline() -> None:
    allowance = Allowance(ends_at=NOON)
    assert allowance.spent(NOON - timedelta(seconds=LEAVE_S + 0.5), 0.0, 0.0) is None
    assert allowance.spent(NOON - timedelta(seconds=LEAVE_S), 0.0, 0.0) == "deadline"
    assert allowance.spent(NOON + timedelta(days=1), 0.0, 0.0) == "deadline"


def test_a_run_drains_early_enough_not_to_overspend_its_gpu_hours() -> None:
    allowance = Allowance(max_gpu_s=3600.0)
    assert allowance.spent(NOON, 3600.0 - 8 * LEAVE_S - 1, 8.0) is None
    assert allowance.spent(NOON, 3600.0 - 8 * LEAVE_S, 8.0) == "gpu_hours"


def test_without_limits_nothing_is_ever_spent() -> None:
    assert Allowance().spent(NOON, 1e12, 1e6) is None


def test_gpus_are_counted_from_the_beginning_of_the_load_to_the_end() -> None:
    """1. two replicas are asked for  2. one is ready at 100 after a load of 30 s  3. it ends at 160."""
    meter = GpuMeter()
    meter.starting(0, 2.0)
    meter.starting(1, 2.0)
    assert (meter.gpu_s(90.0), meter.num_gpus) == (0.0, 0.0)
    meter.ready(0, 100.0, 30.0)
    assert (meter.gpu_s(130.0), meter.num_gpus) == (120.0, 2.0)
    meter.gone(0, 160.0)
    meter.gone(1, 500.0)
    assert (meter.gpu_s(1000.0), meter.num_gpus) == (180.0, 0.0)


def test_a_replica_without_a_gpu_counts_as_one_with_one() -> None:
    meter = GpuMeter()
    meter.starting(0, 0.0)
    meter.ready(0, 10.0, 0.0)
    assert meter.gpu_s(13.0) == 3.0


def event(at_s: float, kind: str, **fields: object) -> Event:
    return {"at": (NOON + timedelta(seconds=at_s)).isoformat(), "event": kind, **fields}  # type: ignore[dict-item]


def test_the_use_of_all_runs_is_read_from_their_events() -> None:
    """1. a run with two replicas of four GPUs, one of which dies, is killed itself  2. a second one ends well."""
    events = [
        event(0, "run_started", run="1"),
        event(1, "replica_starting", replica=0, num_gpus=4),
        event(1, "replica_starting", replica=1, num_gpus=4),
        event(20, "replica_ready", replica=0, start_s=10.0),
        event(30, "replica_ready", replica=1, start_s=10.0),
        event(40, "unit_committed", replica=1, unit="a", num_rows=100),
        event(50, "replica_died", replica=1),
        event(80, "replica_stats", replica=0),
        event(1000, "run_started", run="2"),
        event(1001, "replica_starting", replica=0, num_gpus=1),
        event(1020, "replica_ready", replica=0, start_s=5.0),
        event(1030, "unit_committed", replica=0, unit="b", num_rows=50),
        event(1040, "run_finished"),
    ]
    use = use_of_earlier_runs(events)
    assert use == Use(4 * (80 - 10) + 4 * (50 - 20) + (1040 - 1015), 150)
    assert use.gpu_hours_for(300) == pytest.approx(2 * use.gpu_s / 3600)


def test_replicas_that_were_never_ready_and_events_of_older_versions_are_borne() -> None:
    events = [
        event(0, "run_started", run="1"),
        event(1, "replica_starting", replica=0),
        event(2, "replica_starting", replica=1),
        event(10, "replica_ready", replica=0),
        event(20, "replica_stopped", replica=0, error=""),
        event(3600, "replica_start_failed", replica=1),
        {"at": "yesterday", "event": "replica_stats"},
    ]
    assert use_of_earlier_runs(events) == Use(10.0, 0)
    assert use_of_earlier_runs([]) == Use()
    assert Use().gpu_hours_for(10) is None


def test_what_is_left_is_told_with_what_is_known() -> None:
    assert left_text(1200, None, None) == "1,200 rows are left"
    assert left_text(1200, 75.0, 0.5) == (
        "1,200 rows are left, about 1m15s at the last rate and about 0.5 GPU hours at the rate of all runs so far"
    )
    assert "2026-11-23 12:00:00+00:00" in spent_text(Allowance(ends_at=NOON), "deadline", 0.0)
    assert "max_gpu_hours 2 leave no more: the runs of this output have used 1.99 GPU hours" in spent_text(
        Allowance(max_gpu_s=7200.0), "gpu_hours", 1.99 * 3600
    )
