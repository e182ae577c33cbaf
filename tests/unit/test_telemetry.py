"""Rates over a window, times for people, the one plain line, and logging that commands alone configure."""

import logging
import math

import pytest

from batchinfer.telemetry import (
    RATE_WINDOW_S,
    EngineUse,
    RateMeter,
    RunProgress,
    configure_logging,
    duration,
    progress_line,
    time_left,
)


def test_rates_need_two_readings() -> None:
    meter = RateMeter()
    assert meter.per_second() == (0.0, 0.0, 0.0)
    meter.add(5.0, 10, 20, 30)
    assert meter.per_second() == (0.0, 0.0, 0.0)
    meter.add(7.0, 20, 60, 130)
    assert meter.per_second() == pytest.approx((5.0, 20.0, 50.0))


def test_old_readings_leave_the_window() -> None:
    meter = RateMeter()
    meter.add(0.0, 0, 0, 0)
    meter.add(1.0, 1000, 1000, 1000)
    for second in range(2, 100):
        meter.add(float(second), 1000 + second, 1000, 1000)
    rows_per_s, prompt_tokens_per_s, _ = meter.per_second()
    assert rows_per_s == pytest.approx(1.0)
    assert prompt_tokens_per_s == 0.0
    assert len(meter._readings) <= RATE_WINDOW_S + 2


def test_the_last_two_readings_stay_however_far_apart_they_are() -> None:
    meter = RateMeter()
    meter.add(0.0, 0, 0, 0)
    meter.add(10 * RATE_WINDOW_S, 300, 0, 0)
    assert meter.per_second()[0] == pytest.approx(1.0)


def test_a_count_that_falls_is_no_negative_rate() -> None:
    meter = RateMeter()
    meter.add(0.0, 50, 50, 50)
    meter.add(1.0, 40, 60, 40)
    assert meter.per_second() == pytest.approx((0.0, 10.0, 0.0))


def test_two_readings_at_one_moment_are_no_division_by_zero() -> None:
    meter = RateMeter()
    meter.add(1.0, 0, 0, 0)
    meter.add(1.0, 0, 0, 0)
    assert meter.per_second() == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75.0, "1m15s"),
        (3599.6, "1h00m"),
        (5400.0, "1h30m"),
        (86_400.0 * 2 + 3600 * 3, "2d03h"),
    ],
)
def test_durations_show_their_two_largest_parts(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_line_says_what_matters_and_leaves_out_what_is_not_there() -> None:
    quiet = RunProgress(
        num_rows=1000, num_rows_committed=100, num_rows_finished=50, num_units=10, num_units_committed=1
    )
    assert progress_line(quiet) == ("150 of 1,000 rows, 1 of 10 units committed, 0 tok/s in, 0 tok/s out, 0 replicas")
    busy = RunProgress(
        num_rows=1000,
        prompt_tokens_per_s=1234.5,
        completion_tokens_per_s=99.5,
        num_replicas_ready=2,
        num_replicas_starting=1,
        num_dead_letters=3,
        eta_s=75.0,
    )
    line = progress_line(busy)
    assert "1,234 tok/s in" in line
    assert line.endswith("2 replicas (1 starting), 3 dead letters, ETA 1m15s")


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (EngineUse(), ""),
        (EngineUse(num_active=48, capacity=64), ", batch 75%"),
        (
            EngineUse(8, 8, kv_use=0.634, idle_share=0.02, padding_share=0.115, num_preemptions=1200),
            ", batch 100%, KV 63%, padding 12%, idle 2%, 1,200 preemptions",
        ),
        (EngineUse(8, 8, kv_use=0.0, idle_share=0.0, padding_share=0.0), ", batch 100%, KV 0%, idle 0%"),
    ],
)
def test_the_line_says_how_busy_the_engines_are(use: EngineUse, text: str) -> None:
    line = progress_line(RunProgress(num_replicas_ready=2, engines=use))
    assert line.partition("2 replicas")[2] == text


@pytest.mark.parametrize(
    ("range_s", "text"),
    [
        (None, "12m00s"),
        ((600.0, 905.0), "12m00s (10m00s to 15m05s)"),
        ((600.0, math.inf), "12m00s (10m00s or more)"),
        ((720.1, 720.2), "12m00s"),
    ],
)
def test_the_time_left_shows_a_range_where_there_is_one(range_s: tuple[float, float] | None, text: str) -> None:
    assert time_left(720.0, range_s) == text


def test_logging_goes_to_stderr_with_ours_at_info_and_others_at_warning(capsys: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("batchinfer")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()
    try:
        configure_logging()
        logging.getLogger("batchinfer.cluster.driver").info("one of ours")
        logging.getLogger("somebody").info("not shown")
        logging.getLogger("somebody").warning("a warning")
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "INFO one of ours" in captured.err
    assert "WARNING a warning" in captured.err
    assert "not shown" not in captured.err
