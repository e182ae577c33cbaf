"""Bisection alone: any set of poison rows, a replica that dies exactly when it meets one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.bisection import MAX_DEATHS_BETWEEN_SURVIVALS, MAX_DEATHS_IN_A_ROW, Bisection


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


def test_it_is_hopeless_soon_where_nothing_survives_and_late_where_something_did() -> None:
    bisection = Bisection(1024)
    for _ in range(MAX_DEATHS_IN_A_ROW - 1):
        bisection.killed()
    assert not bisection.hopeless
    bisection.survived()
    for _ in range(MAX_DEATHS_BETWEEN_SURVIVALS):
        assert not bisection.hopeless
        bisection.killed()
    assert bisection.hopeless

    nothing_survives = Bisection(1024)
    for _ in range(MAX_DEATHS_IN_A_ROW):
        assert not nothing_survives.hopeless
        nothing_survives.killed()
    assert nothing_survives.hopeless


@pytest.mark.parametrize("first", [0, 480, 950])
def test_a_cluster_of_poison_is_found_to_its_last_row(first: int) -> None:
    """Neighbours in a shard are often alike: the same broken source, the same over-long field."""
    poison = set(range(first, first + 60))
    bisection = Bisection(1024)
    while not bisection.finished:
        assert not bisection.hopeless
        if poison & set(bisection.next_offsets):
            bisection.killed()
        else:
            bisection.survived()
    assert set(bisection.found) == poison


def test_after_a_death_the_other_half_is_probed_whole_and_before_any_quarter() -> None:
    bisection = Bisection(8)
    bisection.killed()
    assert bisection.next_offsets == range(4, 8)
    bisection.survived()
    assert bisection.next_offsets == range(2)
