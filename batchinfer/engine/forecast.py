"""How many places the running rows will take in the steps to come, from nothing but the lengths seen so far.

All running rows grow by one place a step and give everything back when they end. So if row i holds b_i + t places at
step t and ends at step e_i, the places taken at t are the sum of b_i + t over rows with e_i >= t, and the most is
reached just before some row ends: a suffix sum over the rows ordered by their ends. Rows that end within a few steps
of each other are taken to end together, so one look at the future costs an addition per span of steps, not per row.

The mean length would make a poor e_i: rows that outlive it hold the most places, and it says that there are none. So
each row is given a length out of those observed, spread evenly over them, among the longer ones if it outlives it.
"""

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, replace
from math import log

#: Steps of one span: the rows expected to end in it are taken to end together, at the mean of their ends.
_SPAN_STEPS = 16
#: Lengths that stand for the prior, until as many outputs were seen as are remembered.
_NUM_PRIOR, _NUM_REMEMBERED = 64, 1024
_GOLDEN_RATIO = 0.6180339887498949


def _share(sequence: int) -> float:
    """In [0, 1), spread evenly however many sequences there are (Weyl's sequence), and the same each time asked.

    With new dice for each question the row at the head of the line would be asked about until it looks short.
    """
    return sequence * _GOLDEN_RATIO % 1


class OutputLengths:
    """The lengths of the last outputs. Before any was seen: exponential with mean ``prior_tokens``."""

    def __init__(self, prior_tokens: int) -> None:
        self._recent = deque(round(-prior_tokens * log(1 - (index + 0.5) / _NUM_PRIOR)) for index in range(_NUM_PRIOR))
        self._in_order = sorted(self._recent)

    def observe(self, num_tokens: int) -> None:
        if len(self._recent) == _NUM_REMEMBERED:
            del self._in_order[bisect_right(self._in_order, self._recent.popleft()) - 1]
        self._recent.append(num_tokens)
        insort(self._in_order, num_tokens)

    def longer_than(self, num_tokens: int, share: float) -> int:
        """Of the observed lengths above ``num_tokens`` the one that ``share`` of them lie below.

        Half as much again if none was observed.
        """
        first = bisect_right(self._in_order, num_tokens)
        num_longer = len(self._in_order) - first
        if not num_longer:
            return num_tokens + num_tokens // 2 + 1
        return self._in_order[first + int(share * num_longer)]


@dataclass(slots=True)
class _Span:
    """Rows expected to end within one span of steps: the sums of their b_i and of their ends."""

    num_rows: int = 0
    total_base: int = 0
    total_end: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    """``first_step`` is when it had, or would have had, no generated token yet; ``last_step`` when it must end."""

    base: int
    first_step: int
    end: int
    last_step: int


class Forecast:
    """Expected ends of running rows."""

    def __init__(self, lengths: OutputLengths) -> None:
        self._lengths = lengths
        self._rows: dict[int, _Row] = {}
        self._spans: dict[int, _Span] = {}
        self._ending: dict[int, set[int]] = {}

    def observe(self, num_output_tokens: int) -> None:
        """An output ended by itself after so many tokens."""
        self._lengths.observe(num_output_tokens)

    def add(self, sequence: int, step: int, num_places: int, num_generated: int, max_remaining: int) -> None:
        """A row starts at ``step`` with ``num_places``.

        It has generated ``num_generated`` tokens and may generate ``max_remaining`` more.
        """
        first_step = step - num_generated
        end = first_step + self._lengths.longer_than(num_generated, _share(sequence))
        last_step = step + max_remaining
        self._put(sequence, _Row(num_places - step, first_step, min(end, last_step), last_step))

    def remove(self, sequence: int) -> None:
        row = self._rows.pop(sequence)
        number = row.end // _SPAN_STEPS
        span = self._spans[number]
        span.num_rows -= 1
        span.total_base -= row.base
        span.total_end -= row.end
        self._ending[number].remove(sequence)
        if not span.num_rows:
            del self._spans[number], self._ending[number]

    def advance(self, step: int) -> None:
        """To be called for every step in turn. Rows that should have ended are expected to become longer."""
        for sequence in tuple(self._ending.get(step // _SPAN_STEPS - 1, ())):
            row = self._rows[sequence]
            self.remove(sequence)
            end = row.first_step + self._lengths.longer_than(step - row.first_step, _share(sequence))
            self._put(sequence, replace(row, end=max(step, min(end, row.last_step))))

    def peak(self) -> int:
        """The most places that the rows in hand will take at once, from now on until they end."""
        num_rows = total_base = peak = 0
        for number in sorted(self._spans, reverse=True):
            span = self._spans[number]
            num_rows += span.num_rows
            total_base += span.total_base
            peak = max(peak, total_base + num_rows * span.total_end // span.num_rows)
        return peak

    def _put(self, sequence: int, row: _Row) -> None:
        number = row.end // _SPAN_STEPS
        span = self._spans.setdefault(number, _Span())
        span.num_rows += 1
        span.total_base += row.base
        span.total_end += row.end
        self._ending.setdefault(number, set()).add(sequence)
        self._rows[sequence] = row
