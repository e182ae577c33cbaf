from hypothesis import example, given
from hypothesis import strategies as st

from batchinfer.engine.batching import (
    BatchLimits,
    BatchShape,
    RowShape,
    choose_preempted,
    fill_holes,
    group_size,
    limits_after_out_of_memory,
    order_key,
    plan_admission,
)

EMPTY = BatchShape(num_rows=0, width=0, max_remaining=0)
LIMITS = st.builds(BatchLimits, st.integers(1, 64), st.integers(1, 5000), st.integers(1, 2000))
ROWS = st.lists(st.builds(RowShape, st.integers(1, 300), st.integers(1, 300)), max_size=80)
BATCHES = st.one_of(st.just(EMPTY), st.builds(BatchShape, st.integers(1, 64), st.integers(1, 300), st.integers(1, 300)))


@given(ROWS, BATCHES, LIMITS, st.integers(1, 300))
@example([RowShape(1, 1)] * 2, BatchShape(2, 1, 1), BatchLimits(1, 6, 1), 1)
def test_admission_respects_every_limit(
    rows: list[RowShape], batch: BatchShape, limits: BatchLimits, expected: int
) -> None:
    num = plan_admission(rows, batch, limits, expected)
    assert 0 <= num <= len(rows)
    total = batch.num_rows + num
    if num:
        assert total <= limits.max_rows
        width = max(batch.width, *(row.length for row in rows[:num]), 0)
        if total > 1:
            assert total * (width + 1) <= limits.max_tokens
        if num > 1:
            assert num * max(row.length for row in rows[:num]) <= limits.max_prefill_tokens


@given(ROWS.filter(bool), LIMITS, st.integers(1, 300))
def test_an_empty_batch_always_takes_a_row(rows: list[RowShape], limits: BatchLimits, expected: int) -> None:
    assert plan_admission(rows, EMPTY, limits, expected) >= 1


def test_rows_join_in_groups_but_the_last_ones_at_once() -> None:
    limits = BatchLimits(max_rows=64, max_tokens=10**6, max_prefill_tokens=10**4)
    wanted = group_size(64, 64)
    assert 5 <= wanted <= 20
    rows = [RowShape(10, 50)] * 40
    assert plan_admission(rows, BatchShape(64 - wanted + 1, 60, 50), limits, 64) == 0
    assert plan_admission(rows, BatchShape(64 - wanted, 60, 50), limits, 64) == wanted
    assert plan_admission(rows[:2], BatchShape(60, 60, 50), limits, 64) == 2


def test_copies_of_a_prompt_do_not_count_as_prefill() -> None:
    limits = BatchLimits(max_rows=16, max_tokens=10**6, max_prefill_tokens=100)
    rows = [RowShape(60, 9), *[RowShape(60, 9, is_copy=True)] * 7, RowShape(60, 9)]
    assert plan_admission(rows, EMPTY, limits, 9) == 8
    assert plan_admission([RowShape(60, 9)] * 9, EMPTY, limits, 9) == 1


def test_short_outputs_are_prefilled_in_larger_groups() -> None:
    assert group_size(64, 8) > group_size(64, 512) >= 1
    assert group_size(64, 1) == 64


def test_order_is_long_first_within_blocks_of_arrivals() -> None:
    lengths = [5, 9, 1, 7, 30, 20]
    order = sorted(range(6), key=lambda arrival: order_key(arrival, lengths[arrival], capacity=2))
    assert order == [1, 3, 0, 2, 4, 5]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), LIMITS)
def test_preemption_brings_the_batch_within_its_limit_or_down_to_one_row(
    lengths: list[int], limits: BatchLimits
) -> None:
    admissions = list(range(len(lengths)))[::-1]
    preempted = choose_preempted(lengths, admissions, limits)
    kept = [length for index, length in enumerate(lengths) if index not in preempted]
    assert len(kept) >= 1
    assert len(kept) == 1 or len(kept) * (max(kept) + 1) <= limits.max_tokens
    if len(lengths) * (max(lengths) + 1) <= limits.max_tokens:
        assert preempted == []
    newest_first = sorted(range(len(lengths)), key=lambda index: -admissions[index])
    assert preempted == newest_first[: len(preempted)]


@given(LIMITS, st.builds(BatchShape, st.integers(2, 64), st.integers(1, 300), st.integers(1, 300)))
def test_out_of_memory_always_lowers_what_may_be_tried_next(limits: BatchLimits, batch: BatchShape) -> None:
    after = limits_after_out_of_memory(limits, batch, num_prefill_tokens=batch.width, expected_new_tokens=64)
    assert 1 <= after.max_tokens < max(2, limits.max_tokens)
    assert 1 <= after.max_prefill_tokens <= limits.max_prefill_tokens
    failed = batch.num_rows * (batch.width + min(max(64, 16), batch.max_remaining))
    assert after.max_tokens <= max(1, failed // 2)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_fill_holes_keeps_every_staying_row_with_few_moves(case: tuple[int, set[int]]) -> None:
    num_rows, leaving = case
    places = list(range(num_rows))
    moves = fill_holes(num_rows, sorted(leaving))
    for target, source in moves:
        places[target] = source
    assert sorted(places[: num_rows - len(leaving)]) == [row for row in range(num_rows) if row not in leaving]
    assert len(moves) <= len(leaving)
