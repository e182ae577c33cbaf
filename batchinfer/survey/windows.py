"""Which rows a sample looks at: short runs of neighbours, spread over the input, the same ones every time. Pure."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate, groupby

from batchinfer.records import WorkUnit

#: Neighbours read together: what opening a shard and decoding the way there costs is shared by so many rows.
ROWS_PER_WINDOW = 16
#: Rows of one shard that one task of a worker goes through: half a second or so.
_ROWS_PER_TASK = 2048
#: A task of a sample takes in several shards, for it has a few rows of each.
_SAMPLED_ROWS_PER_TASK = 256


def sample_windows(units: Sequence[WorkUnit], num_rows: int) -> tuple[WorkUnit, ...]:
    """Row ranges of about ``num_rows`` rows in all, in the order of ``units``; all units where they hold no more.

    The rows of all units, one after the other, are cut into strata of equal length. In each lies one window, at a
    place that depends on its number alone, so that no rhythm of the input (a shard's order, say) meets the
    sample's. Windows do not overlap and do not leave their unit, for which one may be shorter.
    """
    ends = list(accumulate(unit.num_rows for unit in units))
    total = ends[-1] if ends else 0
    if total <= num_rows:
        return tuple(units)
    if num_rows < 1:
        return ()
    length = min(ROWS_PER_WINDOW, num_rows, max(unit.num_rows for unit in units))
    num_windows = -(-num_rows // length)
    windows: list[WorkUnit] = []
    for number in range(num_windows):
        begin, end = number * total // num_windows, (number + 1) * total // num_windows
        row = begin + int(_fraction(number) * max(1, end - begin - length + 1))
        index = bisect_right(ends, row)
        unit = units[index]
        offset = min(row - (ends[index] - unit.num_rows), max(0, unit.num_rows - length))
        if windows and windows[-1].shard_id == unit.shard_id:
            offset = max(offset, windows[-1].first_row + windows[-1].num_rows - unit.first_row)
        if offset < unit.num_rows:
            windows.append(WorkUnit(unit.shard_id, unit.first_row + offset, min(length, unit.num_rows - offset)))
    return tuple(windows)


def within_reach(windows: Sequence[WorkUnit], group_starts: Sequence[int], max_skipped_rows: int) -> list[WorkUnit]:
    """Windows of one shard, moved so that reaching each decodes at most ``max_skipped_rows`` rows beside its own.

    ``group_starts`` are the first rows of the shard's row groups and, last, its number of rows. A row group can only
    be decoded from its start on, and it may hold the whole shard. Windows stay in their group, in their order and
    apart from each other; where they lie near enough to its start nothing moves. One that reaches into the next group
    is cut off.
    """
    moved: list[WorkUnit] = []
    for group, members in groupby(windows, key=lambda window: bisect_right(group_starts, window.first_row) - 1):
        start, end = group_starts[group], group_starts[group + 1]
        inside = [WorkUnit(it.shard_id, it.first_row, min(it.num_rows, end - it.first_row)) for it in members]
        reach = sum(max_skipped_rows + window.num_rows for window in inside)
        if inside[-1].first_row + inside[-1].num_rows - start <= reach:
            moved += inside
            continue
        for window in inside:
            moved.append(WorkUnit(window.shard_id, start, window.num_rows))
            start += window.num_rows + max_skipped_rows
    return moved


def tasks_of(ranges: Sequence[WorkUnit], *, is_sample: bool) -> Iterator[tuple[WorkUnit, ...]]:
    """Ranges, in order, in tasks for workers: of a sample all that a shard has, for :func:`within_reach` moves them
    together, and of several shards; of whole units some of one shard.
    """
    task: list[WorkUnit] = []
    num_rows = 0
    for index, each in enumerate(ranges):
        task.append(each)
        num_rows += each.num_rows
        is_last = index + 1 == len(ranges)
        ends_shard = is_last or ranges[index + 1].shard_id != each.shard_id
        is_whole = ends_shard and num_rows >= _SAMPLED_ROWS_PER_TASK if is_sample else num_rows >= _ROWS_PER_TASK
        if is_last or is_whole or (ends_shard and not is_sample):
            yield tuple(task)
            task, num_rows = [], 0


def _fraction(number: int) -> float:
    """In [0, 1), without order, the same for the same number."""
    return int.from_bytes(blake2b(number.to_bytes(8, "little"), digest_size=6).digest()) / 2**48
