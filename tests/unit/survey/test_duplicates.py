"""Counting equal hashes, exactly and within a bound."""

import numpy as np
import pytest
from numpy.typing import NDArray

from batchinfer.survey.duplicates import DuplicateCounter, Duplicates


def hashes(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def tokens(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32)


def test_rows_beyond_the_first_of_their_kind_are_duplicates() -> None:
    counter = DuplicateCounter()
    counter.add(hashes(3, 4, 3), tokens(10, 20, 10))
    counter.add(hashes(3, 4, 8), tokens(10, 20, 30))
    # 3 is odd: greedy, twice too many; 4 once.
    assert counter.result() == Duplicates(6, 3, 2, 10 + 10 + 20, is_estimate=False)
    counter.add(hashes(8), tokens(30))
    assert counter.result().num_duplicates == 4


def test_nothing_is_nothing() -> None:
    assert DuplicateCounter().result() == Duplicates(0, 0, 0, 0, is_estimate=False)


@pytest.mark.parametrize("max_distinct", [1000, 5000])
def test_beyond_the_cap_the_counts_are_projected_from_a_share_of_all_hashes(max_distinct: int) -> None:
    random = np.random.default_rng(0)
    distinct = random.integers(0, 2**63, 20_000, dtype=np.uint64) * np.uint64(2)
    rows = np.concatenate([distinct, distinct[:8000], distinct[:2000]])
    random.shuffle(rows)
    counter = DuplicateCounter(max_distinct)
    for part in np.array_split(rows, 17):
        counter.add(part, np.full(len(part), 7, np.uint32))
        assert len(counter._hashes) <= max_distinct
    result = counter.result()
    assert result.is_estimate
    assert result.num_rows == 30_000
    assert abs(result.num_duplicates - 10_000) < 1500
    assert result.num_duplicate_tokens == 7 * result.num_duplicates
    assert result.num_greedy_duplicates == 0
