"""Bisection alone: any set of poison rows, a replica that dies exactly when it meets one."""

import math

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.bisection import MAX_DEATHS_IN_A_ROW, Bisection


def bisect(num_rows: int, poison: set[int], known: tuple[int, ...] = ()) -> tuple[list[int], set[int], int]:
    """Rows convicted, rows that survived a probe, and deaths."""
    bisection = Bisection(num_rows, known)
    survivors: set[int] = set()
    num_deaths = 0
    while not bisection.finished:
        bisection.validate()
        offsets = bisection.next_offsets
        assert len(offsets) > 0
        if poison & set(offsets):
            num_deaths += 1
            bisection.killed()
        else:
            survivors |= set(offsets)
            bisection.survived()
    return bisection.found, survivors, num_deaths


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_exactly_the_poison_rows_are_found_and_every_other_row_survives_a_probe(case: tuple[int, set[int]]) -> None:
    num_rows, poison = case
    found, survivors, num_deaths = bisect(num_rows, poison)
    assert sorted(found) == sorted(poison)
    assert survivors == set(range(num_rows)) - poison
    assert num_deaths <= len(poison) * (math.ceil(math.log2(num_rows)) + 1)


@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_rows_known_before_are_not_probed_again(poison: set[int], known: set[int]) -> None:
    found, survivors, _ = bisect(20, poison - known, tuple(sorted(known)))
    assert sorted(found) == sorted(poison - known)
    assert survivors == set(range(20)) - poison - known


def test_with_all_rows_known_there_is_nothing_to_probe() -> None:
    assert Bisection(3, (0, 1, 2)).finished


def test_a_row_that_dies_once_and_then_survives_is_not_convicted() -> None:
    bisection = Bisection(2)
    bisection.killed()
    bisection.survived()
    assert bisection.next_offsets == range(1)
    bisection.survived()
    assert bisection.finished
    assert bisection.found == []


def test_it_is_hopeless_after_many_deaths_without_a_survival() -> None:
    bisection = Bisection(1024)
    for _ in range(MAX_DEATHS_IN_A_ROW - 1):
        bisection.killed()
    assert not bisection.hopeless
    bisection.survived()
    for _ in range(MAX_DEATHS_IN_A_ROW):
        assert not bisection.hopeless
        bisection.killed()
    assert bisection.hopeless


def test_after_a_death_the_other_half_is_probed_whole_and_before_any_quarter() -> None:
    bisection = Bisection(8)
    bisection.killed()
    assert bisection.next_offsets == range(4, 8)
    bisection.survived()
    assert bisection.next_offsets == range(2)
