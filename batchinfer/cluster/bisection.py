"""Which rows of a unit kill their replica: probes of ever smaller ranges, each alone on a replica. Pure.

Every death costs a replica's start, so the order of probes saves deaths: when the first half of a deadly range
survives, the other half must be deadly and is cut without being probed whole. Both halves of a range come before
the quarters of either: a healthy half is then seen early, which tells a poison row from a sick machine.

A row is convicted only by two deaths alone, one after the other: what is inferred is probed all the same.
A poison row costs at most ``ceil(log2(rows)) + 1`` deaths of probes, a unit without one none.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

#: Deaths alone, without a survival in between, that make a row poison.
NUM_DEATHS_THAT_CONVICT = 2
#: So many deaths in a row, and the bisection is given up, as each row of poison costs three: few where nothing of the
#: unit has survived so far (the machine or the unit as a whole is to blame), more where something has, for poison rows
#: come in clusters, and a unit that is given up each time keeps its job from ever ending.
MAX_DEATHS_IN_A_ROW = 32
MAX_DEATHS_BETWEEN_SURVIVALS = 256


class _Open(NamedTuple):
    """A range to probe; when it survives, ``sibling`` is deadly, when not, ``sibling`` must be probed as well."""

    offsets: range
    sibling: range | None


class Bisection:
    """The rows of one unit that killed its replica as a whole; ``poisoned`` ones, found before, are left out."""

    def __init__(self, num_rows: int, poisoned: Sequence[int] = ()) -> None:
        #: Offsets of the rows convicted so far, in the order of their conviction.
        self.found: list[int] = []
        self._num_deaths: dict[int, int] = {}
        self._num_deaths_in_a_row = 0
        self._has_survival = False
        self._open: deque[_Open] = deque()
        ranges = _ranges_between(num_rows, poisoned)
        if len(ranges) == 1:
            self._range_killed(ranges[0])
        else:
            self._open.extend(_Open(offsets, None) for offsets in ranges)

    @property
    def finished(self) -> bool:
        """Every row has survived or is convicted."""
        return not self._open

    @property
    def hopeless(self) -> bool:
        """Nothing survives: the unit as a whole or the machine is to blame, and going on would cost too much."""
        most = MAX_DEATHS_BETWEEN_SURVIVALS if self._has_survival else MAX_DEATHS_IN_A_ROW
        return self._num_deaths_in_a_row >= most

    @property
    def num_deaths_in_a_row(self) -> int:
        """Since something survived, or since the beginning."""
        return self._num_deaths_in_a_row

    @property
    def next_offsets(self) -> range:
        """The rows to probe now; the same ones until :meth:`survived` or :meth:`killed` is told."""
        return self._open[0].offsets

    def survived(self) -> None:
        """The rows of :attr:`next_offsets` were generated and journaled."""
        self._num_deaths_in_a_row, self._has_survival = 0, True
        probed = self._open.popleft()
        if probed.sibling is not None:
            self._narrow(probed.sibling)

    def killed(self) -> None:
        """The replica that generated the rows of :attr:`next_offsets`, and nothing else, died."""
        self._num_deaths_in_a_row += 1
        probed = self._open.popleft()
        if probed.sibling is not None:
            self._open.appendleft(_Open(probed.sibling, None))
        self._range_killed(probed.offsets)

    def _range_killed(self, offsets: range) -> None:
        if len(offsets) == 1:
            row = offsets.start
            self._num_deaths[row] = self._num_deaths.get(row, 0) + 1
            if self._num_deaths[row] >= NUM_DEATHS_THAT_CONVICT:
                self.found.append(row)
                return
        self._narrow(offsets)

    def _narrow(self, offsets: range) -> None:
        """A row of this range must be deadly: try its halves, or the row itself."""
        if len(offsets) == 1:
            self._open.append(_Open(offsets, None))
        else:
            middle = offsets.start + len(offsets) // 2
            self._open.append(_Open(range(offsets.start, middle), range(middle, offsets.stop)))

    def validate(self) -> None:
        """Raise AssertionError where an invariant is broken."""
        rows = [row for probe in self._open for part in (probe.offsets, probe.sibling or ()) for row in part]
        assert len(rows) == len(set(rows)), "a row is to be probed twice"
        assert not set(rows) & set(self.found), "a convicted row is to be probed"
        assert len(self.found) == len(set(self.found)), "a row is convicted twice"


def _ranges_between(num_rows: int, poisoned: Sequence[int]) -> list[range]:
    bounds = [-1, *sorted(poisoned), num_rows]
    ranges = [range(before + 1, after) for before, after in itertools.pairwise(bounds)]
    return [offsets for offsets in ranges if offsets]
