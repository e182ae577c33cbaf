from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.forecast import Forecast, OutputLengths


def test_the_prior_stands_in_until_outputs_are_seen() -> None:
    lengths = OutputLengths(prior_tokens=100)
    draws = [lengths.longer_than(0, (index + 0.5) / 200) for index in range(200)]
    assert sum(draws) / len(draws) == pytest.approx(100, rel=0.1)
    for _ in range(1024):
        lengths.observe(7)
    assert {lengths.longer_than(0, index / 10) for index in range(10)} == {7}


def test_a_row_that_outlives_most_is_expected_to_be_one_of_the_longer_ones() -> None:
    lengths = OutputLengths(prior_tokens=1)
    for _ in range(1000):
        lengths.observe(10)
    for _ in range(24):
        lengths.observe(500)
    assert lengths.longer_than(0, 0.5) == 10
    assert lengths.longer_than(10, 0.0) == 500
    assert lengths.longer_than(600, 0.5) == 901


def test_rows_that_end_at_different_times_do_not_peak_together() -> None:
    """Both known to end soon by their limits: 100 + 10 places at the first end, 50 + 90 at the second."""
    forecast = Forecast(OutputLengths(10_000))
    forecast.add(1, 0, num_places=100, num_generated=0, max_remaining=1)
    forecast.add(2, 0, num_places=50, num_generated=0, max_remaining=90)
    assert forecast.peak() == 152
    forecast.remove(2)
    assert forecast.peak() == 101
    forecast.remove(1)
    assert forecast.peak() == 0


def test_no_row_is_expected_beyond_its_limit() -> None:
    forecast = Forecast(OutputLengths(10_000))
    forecast.add(1, 5, num_places=30, num_generated=4, max_remaining=20)
    assert forecast.peak() == 50


def test_a_row_that_is_late_is_expected_later() -> None:
    forecast = Forecast(OutputLengths(4))
    forecast.add(1, 0, num_places=10, num_generated=0, max_remaining=1000)
    before = forecast.peak()
    for step in range(1, 200):
        forecast.advance(step)
    assert before < 60
    assert 10 + 199 - 16 <= forecast.peak() <= 10 + 400


@given(st.integers(0, 2**32), st.integers(0, 2), st.integers(1, 60))
def test_the_peak_is_that_of_the_expected_ends(seed: int, num_removed: int, num_rows: int) -> None:
    """Ends are known here (limits below the prior); spans of 16 steps may blur each row by so much."""
    dice = Random(seed)
    forecast = Forecast(OutputLengths(10**9))
    rows = {}
    for sequence in range(num_rows):
        rows[sequence] = (dice.randint(1, 100), dice.randint(1, 300))
        forecast.add(sequence, 0, rows[sequence][0], 0, rows[sequence][1])
    for sequence in range(min(num_removed, num_rows - 1)):
        forecast.remove(sequence)
        del rows[sequence]
    exact = max(
        sum(places + end for places, other_end in rows.values() if other_end >= end) for _, end in rows.values()
    )
    assert exact - 16 * num_rows <= forecast.peak() <= exact + 16 * num_rows
