"""The counting of a run: rates, what is left, and totals that survive the replicas they came from."""

import pytest

from batchinfer.cluster.tally import Tally
from batchinfer.engine.engine import EngineStats
from batchinfer.records import UnitResult


def tally(num_rows: int = 100, samples_per_row: int = 1, before: int = 0) -> Tally:
    return Tally(
        num_rows=num_rows,
        num_units=num_rows // 10,
        num_rows_before=before,
        num_units_before=before // 10,
        num_dead_letters_before=1 if before else 0,
        samples_per_row=samples_per_row,
    )


def unit(num_rows: int = 10, num_dead_letters: int = 0, *, already_committed: bool = False) -> UnitResult:
    return UnitResult(
        unit_id="unit",
        num_rows=num_rows,
        num_completions=num_rows - num_dead_letters,
        num_dead_letters=num_dead_letters,
        num_prompt_tokens=20 * num_rows,
        num_completion_tokens=30 * num_rows,
        elapsed_s=1.0,
        already_committed=already_committed,
        dead_letters_by_type={"too_long": num_dead_letters} if num_dead_letters else {},
    )


def stats(num_finished: int) -> EngineStats:
    return EngineStats(
        num_finished=num_finished, num_prompt_tokens=20 * num_finished, num_completion_tokens=30 * num_finished
    )


def test_units_add_up() -> None:
    count = tally(before=20)
    count.unit_committed(0, unit(10, num_dead_letters=2))
    count.unit_committed(1, unit(10, num_dead_letters=1))
    seen = count.progress(1.0, 1.0, num_ready=2, num_starting=1, num_given_up=3)
    assert (seen.num_rows, seen.num_rows_committed) == (100, 40)
    assert (seen.num_units, seen.num_units_committed) == (10, 4)
    assert seen.num_dead_letters == 4
    assert seen.dead_letters_by_type == {"too_long": 3}
    assert (seen.num_replicas_ready, seen.num_replicas_starting, seen.num_units_given_up) == (2, 1, 3)
    assert (count.num_completions, count.num_prompt_tokens, count.num_completion_tokens) == (17, 400, 600)


def test_a_unit_found_committed_counts_like_one_committed_now() -> None:
    """Its first writer died before it could say so, so nobody has counted it."""
    count = tally()
    count.unit_committed(0, unit(10, already_committed=True))
    assert (count.num_rows_committed, count.num_units_committed, count.num_completions) == (10, 1, 10)


def test_rates_and_the_time_left_come_from_the_readings_between_two_looks() -> None:
    count = tally(num_rows=100)
    count.replica_reported(0, stats(0))
    assert count.progress(10.0, 0.0, 1, 0, 0).eta_s is None
    count.replica_reported(0, stats(20))
    seen = count.progress(12.0, 2.0, 1, 0, 0)
    assert seen.prompt_tokens_per_s == pytest.approx(200)
    assert seen.completion_tokens_per_s == pytest.approx(300)
    assert seen.num_rows_finished == 20
    assert seen.eta_s == pytest.approx(8.0)


def test_rates_are_of_the_last_half_minute_alone() -> None:
    count = tally(num_rows=10_000)
    for second in range(100):
        count.replica_reported(0, stats(10 * min(second, 50)))
        seen = count.progress(float(second), float(second), 1, 0, 0)
    assert seen.num_completion_tokens == 30 * 500
    assert seen.completion_tokens_per_s == 0.0
    assert seen.eta_s is None


def test_finished_rows_are_those_not_committed_yet() -> None:
    count = tally()
    count.replica_reported(0, stats(15))
    count.unit_committed(0, unit(10))
    seen = count.progress(1.0, 1.0, 1, 0, 0)
    assert (seen.num_rows_committed, seen.num_rows_finished) == (10, 5)


def test_samples_of_a_row_count_as_one_row() -> None:
    count = tally(samples_per_row=4)
    count.replica_reported(0, stats(19))
    assert count.progress(1.0, 1.0, 1, 0, 0).num_rows_finished == 4


def test_rows_that_never_reached_the_engine_do_not_make_finished_rows_negative() -> None:
    count = tally()
    count.replica_reported(0, stats(2))
    count.unit_committed(0, unit(10, num_dead_letters=8))
    assert count.progress(1.0, 1.0, 1, 0, 0).num_rows_finished == 0


def test_a_dead_replica_takes_its_unfinished_rows_but_not_its_tokens() -> None:
    count = tally()
    count.replica_reported(0, stats(25))
    count.replica_reported(1, stats(5))
    count.unit_committed(0, unit(20))
    before = count.progress(1.0, 1.0, 2, 0, 0)
    count.replica_died(0)
    after = count.progress(2.0, 2.0, 1, 0, 0)
    assert before.num_completion_tokens == after.num_completion_tokens == 900
    assert (before.num_rows_finished, after.num_rows_finished) == (10, 5)
    assert after.num_rows_committed == 20
    assert count.num_replicas_died == 1
    # What the replica in its place reports starts at zero and adds to that.
    count.replica_reported(2, stats(10))
    assert count.progress(3.0, 3.0, 2, 0, 0).num_completion_tokens == 1200


def test_losing_unfinished_rows_never_shows_a_negative_rate() -> None:
    count = tally()
    count.replica_reported(0, stats(50))
    count.progress(1.0, 1.0, 1, 0, 0)
    count.replica_died(0)
    seen = count.progress(2.0, 2.0, 0, 1, 0)
    assert seen.completion_tokens_per_s == 0.0
    assert seen.eta_s is None


def test_a_replica_may_die_before_it_ever_reported() -> None:
    count = tally()
    count.replica_died(7)
    assert count.progress(1.0, 1.0, 0, 1, 0).num_completion_tokens == 0
