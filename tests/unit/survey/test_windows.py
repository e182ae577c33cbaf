"""Which rows a sample looks at."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.records import WorkUnit
from batchinfer.survey.windows import ROWS_PER_WINDOW, sample_windows, tasks_of, within_reach


def units(*lengths: int, shard: str = "s") -> list[WorkUnit]:
    """Units of one shard, one behind the other."""
    first, found = 0, []
    for length in lengths:
        found.append(WorkUnit(shard, first, length))
        first += length
    return found


def rows_of(ranges: list[WorkUnit] | tuple[WorkUnit, ...]) -> list[tuple[str, int]]:
    return [(each.shard_id, row) for each in ranges for row in range(each.first_row, each.first_row + each.num_rows)]


def test_a_small_input_is_looked_at_whole() -> None:
    assert sample_windows(units(10, 10), 20) == tuple(units(10, 10))
    assert sample_windows([], 20) == ()
    assert sample_windows(units(10), 0) == ()


def test_a_sample_is_spread_over_all_shards_and_is_the_same_every_time() -> None:
    many = [unit for shard in range(100) for unit in units(1000, 1000, shard=f"s{shard}")]
    windows = sample_windows(many, 1600)
    assert windows == sample_windows(many, 1600)
    assert len(windows) == 100
    assert len({window.shard_id for window in windows}) > 90
    # Not always the first rows of a shard or a unit.
    assert len({window.first_row % 1000 for window in windows}) > 50


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(0, 400))
def test_windows_are_rows_of_the_units_each_at_most_once(lengths: list[int], num_rows: int) -> None:
    whole = units(*lengths)
    windows = sample_windows(whole, num_rows)
    rows = rows_of(windows)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(rows_of(whole))
    assert rows == sorted(rows)
    assert len(rows) <= max(num_rows + ROWS_PER_WINDOW, 0) or sum(lengths) <= num_rows
    # No window spans two units: it is read as a part of one.
    for window in windows:
        assert any(
            unit.first_row <= window.first_row and window.first_row + window.num_rows <= unit.first_row + unit.num_rows
            for unit in whole
        )


def test_windows_near_their_row_groups_start_stay() -> None:
    windows = units(16, 16)
    assert within_reach(windows, (0, 1000, 2000), 100) == windows


def test_windows_far_into_a_row_group_are_moved_to_where_it_can_be_entered() -> None:
    windows = [WorkUnit("s", first, 16) for first in (700, 900, 1500)]
    moved = within_reach(windows, (0, 1000, 2000), 50)
    assert [window.first_row for window in moved] == [0, 66, 1000]
    # Each in its own row group, none twice.
    assert len(set(rows_of(moved))) == 48


@given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.integers(1, 300), st.integers(0, 200))
def test_moving_never_doubles_a_row_nor_reads_far(groups: list[int], num_rows: int, max_skipped: int) -> None:
    starts = [0]
    for length in groups:
        starts.append(starts[-1] + length)
    # Units do not care for row groups.
    whole, rest = divmod(starts[-1], 23)
    windows = sample_windows(units(*[23] * whole, *[rest] * (rest > 0)), num_rows)
    moved = within_reach(windows, starts, max_skipped)
    assert len(moved) == len(windows)
    assert all(0 < new.num_rows <= old.num_rows for new, old in zip(moved, windows, strict=True))
    rows = rows_of(moved)
    assert rows == sorted(set(rows))
    for start, end in pairwise(starts):
        inside = [window for window in moved if start <= window.first_row < end]
        assert all(window.first_row + window.num_rows <= end for window in inside)
        if inside:
            decoded = inside[-1].first_row + inside[-1].num_rows - start
            assert decoded <= sum(max_skipped + window.num_rows for window in inside)


def test_tasks_keep_the_order_and_a_samples_shards_together() -> None:
    many = [unit for shard in range(3) for unit in units(*[1000] * 5, shard=f"s{shard}")]
    tasks = list(tasks_of(many, is_sample=False))
    assert [each for task in tasks for each in task] == many
    assert all(len({each.shard_id for each in task}) == 1 for task in tasks)
    assert [sum(each.num_rows for each in task) for task in tasks] == [3000, 2000] * 3
    windows = sample_windows(many, 640)
    sampled = list(tasks_of(windows, is_sample=True))
    assert [each for task in sampled for each in task] == list(windows)
    assert len([each.shard_id for task in sampled for each in {one.shard_id: one for one in task}.values()]) == 3
