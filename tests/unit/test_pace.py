"""The time left and its spread, from how the pace varied so far."""

import math
import random

import pytest

from batchinfer.pace import SLICE_S, WINDOW_S, PaceMeter, TimeLeft


def after(rows_of_seconds: list[float], num_ready: int = 1) -> tuple[PaceMeter, float]:
    """A meter that was read once a second; (meter, rows done)."""
    meter, num_rows = PaceMeter(), 0.0
    meter.add(0.0, 0.0, 0)
    for second, rows in enumerate(rows_of_seconds, 1):
        num_rows += rows
        meter.add(float(second), num_rows, num_ready)
    return meter, num_rows


def test_nothing_is_known_before_the_first_row_or_without_a_replica() -> None:
    assert PaceMeter().time_left(10, 1) is None
    assert after([0.0] * 20)[0].time_left(10, 1) is None
    assert after([1.0] * 20)[0].time_left(10, 0) is None


def test_an_even_pace_leaves_no_doubt() -> None:
    left = after([2.0] * 60)[0].time_left(100, 1)
    assert left is not None
    assert left.eta_s == pytest.approx(50.0)
    assert left.low_s == pytest.approx(50.0)
    assert left.high_s == pytest.approx(50.0)


def test_a_spread_needs_a_few_slices() -> None:
    assert after([2.0] * int(2 * SLICE_S))[0].time_left(100, 1) == TimeLeft(50.0)


def test_twice_the_replicas_take_half_the_time_at_once() -> None:
    meter, _ = after([2.0] * 60, num_ready=4)
    one, two = meter.time_left(100, 4), meter.time_left(100, 8)
    assert one is not None
    assert two is not None
    assert one.eta_s == pytest.approx(2 * two.eta_s)


def test_time_in_which_replicas_loaded_is_no_time_of_theirs() -> None:
    meter = PaceMeter()
    for second in range(1000):
        meter.add(float(second), 0.0, 0)
    for second in range(1000, 1100):
        meter.add(float(second), 3.0 * (second - 999), 1)
    left = meter.time_left(30, 1)
    assert left is not None
    assert left.eta_s == pytest.approx(10.0, rel=0.05)


def test_rows_in_bursts_make_the_range_wide_and_a_standstill_makes_it_open() -> None:
    even, bursts = after([2.0] * 100)[0], after(([0.0] * 24 + [50.0]) * 4)[0]
    low, wide = even.time_left(100, 1), bursts.time_left(100, 1)
    assert low is not None
    assert wide is not None
    assert wide.eta_s == pytest.approx(low.eta_s)
    assert wide.low_s is not None
    assert wide.low_s < 40
    assert wide.high_s == math.inf


def test_what_is_long_gone_does_not_count() -> None:
    meter, _ = after([10.0] * 300 + [1.0] * int(WINDOW_S + 2 * SLICE_S))
    left = meter.time_left(100, 1)
    assert left is not None
    assert left.eta_s == pytest.approx(100.0, rel=0.01)


def test_the_range_holds_the_truth_about_as_often_as_it_says() -> None:
    """Poisson-like bursts: a run is stopped a third of the way, its range compared with what then happened."""
    generator = random.Random(7)
    num_right = num_tried = 0
    for _ in range(200):
        rows = [generator.choice([0.0, 0.0, 0.0, 8.0]) * generator.random() for _ in range(900)]
        meter, done = after(rows[:200])
        num_left = sum(rows) - done
        left = meter.time_left(num_left, 1)
        assert left is not None
        assert left.low_s is not None
        assert left.high_s is not None
        num_tried += 1
        num_right += left.low_s <= 700 <= left.high_s
    assert 0.88 <= num_right / num_tried <= 0.99
