"""The padded engine's decisions, over plain integers: who joins the batch, who leaves it, what fits.

The batch is a rectangle: its rows are padded on the left to the longest of them (the *width*), and its KV
cache takes ``rows * width`` token places. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

#: Columns a batch must have room to grow by before a row joins, beyond what its rows are expected to need.
_MIN_GROWTH = 16


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """``max_tokens`` bounds rows times width, ``max_prefill_tokens`` rows times width of one prefill."""

    max_rows: int
    max_tokens: int
    max_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class RowShape:
    """A row's tokens so far and how many more it may generate.

    A copy is another sample of the row before it: it takes a place in the batch, but its prompt is read once.
    """

    length: int
    max_remaining: int
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The running batch; ``max_remaining`` is the largest of its rows."""

    num_rows: int
    width: int
    max_remaining: int


def group_size(max_rows: int, expected_new_tokens: int) -> int:
    """How many rows should join at once.

    A prefill costs one pass over the weights, as a decode step does, whatever it carries: shared by g rows it
    costs each 1/g of a pass. Waiting until g places are free leaves g/2 of them empty on average, which costs
    each of a row's T tokens another g / (2 max_rows^2) of a pass. The sum is least at max_rows * sqrt(2 / T).
    """
    return max(1, min(max_rows, round(max_rows * sqrt(2.0 / max(1, expected_new_tokens)))))


def order_key(arrival: int, length: int, capacity: int) -> tuple[int, int, int]:
    """Sorting by it gives the order of admission: long prompts first, within blocks of arrivals.

    Neighbours have about one length, so a group is hardly padded, and the longest rows do not start last.
    A block goes wholly before the next one, so no short row waits for as long as longer ones keep coming.
    """
    return (arrival // (2 * capacity), -length, arrival)


def plan_admission(
    waiting: Sequence[RowShape], batch: BatchShape, limits: BatchLimits, expected_new_tokens: int
) -> int:
    """How many of the first waiting rows to prefill now; 0 = decode on.

    A row joins if the batch, grown by what its rows are expected to generate, stays within the limits. While
    rows are running, nobody joins until a group is together (see :func:`group_size`) or everybody fits. An
    empty batch always takes a row, however large: it alone can tell whether it fits the device.
    """
    num_fitting = num_in_prefill = num_read = 0
    width, max_remaining, prefill_width = batch.width, batch.max_remaining, 0
    # A batch above max_rows (its limit was lowered while it ran) takes nobody; a slice must not turn negative.
    for row in waiting[: max(0, limits.max_rows - batch.num_rows)]:
        width = max(width, row.length)
        max_remaining = max(max_remaining, row.max_remaining)
        growth = min(max(expected_new_tokens, _MIN_GROWTH), max_remaining)
        num_rows = batch.num_rows + num_fitting + 1
        if num_rows > 1 and num_rows * (width + growth) > limits.max_tokens:
            break
        num_fitting += 1
        num_read += not row.is_copy
        prefill_width = max(prefill_width, row.length)
        if num_read <= 1 or num_read * prefill_width <= limits.max_prefill_tokens:
            num_in_prefill = num_fitting
    enough = min(len(waiting), group_size(limits.max_rows, expected_new_tokens))
    return num_in_prefill if batch.num_rows == 0 or num_fitting >= enough else 0


def choose_preempted(lengths: Sequence[int], admissions: Sequence[int], limits: BatchLimits) -> list[int]:
    """Rows that must go back to waiting before the next step; the newest first, as they lose the least work.

    None while the batch, one column wider, is within ``max_tokens``; else as many as make room for
    ``_MIN_GROWTH`` columns. One row always stays.
    """
    kept = sorted(range(len(lengths)), key=lambda index: admissions[index])
    preempted: list[int] = []
    if len(kept) * (max(lengths, default=0) + 1) <= limits.max_tokens:
        return preempted
    while len(kept) > 1 and len(kept) * (max(lengths[index] for index in kept) + _MIN_GROWTH) > limits.max_tokens:
        preempted.append(kept.pop())
    return preempted


def limits_after_out_of_memory(
    limits: BatchLimits, batch: BatchShape, num_prefill_tokens: int, expected_new_tokens: int
) -> BatchLimits:
    """Half of what did not fit: the batch that failed (as it was planned, growth included) and its prefill."""
    growth = min(max(expected_new_tokens, _MIN_GROWTH), batch.max_remaining)
    planned_tokens = batch.num_rows * (batch.width + growth)
    return BatchLimits(
        max_rows=limits.max_rows,
        max_tokens=max(1, min(limits.max_tokens, planned_tokens) // 2),
        max_prefill_tokens=max(1, min(limits.max_prefill_tokens, num_prefill_tokens or limits.max_prefill_tokens) // 2),
    )


def fill_holes(num_rows: int, leaving: Sequence[int]) -> list[tuple[int, int]]:
    """Moves (to, from) that leave the remaining rows in the first places, moving as few as possible."""
    gone = set(leaving)
    num_kept = num_rows - len(gone)
    holes = [index for index in range(num_kept) if index in gone]
    movers = [index for index in range(num_kept, num_rows) if index not in gone]
    return list(zip(holes, movers, strict=True))
