"""How long the rest will take and how sure that is, from the rows a ready replica does and how they vary. Pure."""

import itertools
import math
from collections import deque
from dataclasses import dataclass, field

#: The pace is taken from so much of the past, in slices long enough that rows which end together are one event.
WINDOW_S = 600.0
SLICE_S = 10.0
#: Slices below which no spread is told.
MIN_SLICES = 3


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """``eta_s`` seconds are left; 19 times of 20 between ``low_s`` and ``high_s`` if the pace goes on varying so."""

    eta_s: float
    #: None while too little has been seen; ``high_s`` is infinite where even a standstill would be no surprise.
    low_s: float | None = None
    high_s: float | None = None


@dataclass(slots=True)
class PaceMeter:
    """Readings of (time, rows done, ready replicas). Replicas that come or go change the time left at once."""

    #: (time, rows, seconds of ready replicas so far) at the edges of slices.
    _edges: deque[tuple[float, float, float]] = field(default_factory=deque)
    _last: tuple[float, float, float] | None = None

    def add(self, at_s: float, num_rows: float, num_ready: float) -> None:
        """Take a reading; ``num_ready`` replicas were ready since the one before."""
        replica_s = 0.0 if self._last is None else self._last[2] + num_ready * (at_s - self._last[0])
        self._last = (at_s, num_rows, replica_s)
        if not replica_s:
            # Nothing could be done before the first replica was ready.
            self._edges.clear()
        if not self._edges or at_s - self._edges[-1][0] >= SLICE_S:
            self._edges.append(self._last)
        while at_s - self._edges[0][0] > WINDOW_S and len(self._edges) > MIN_SLICES:
            self._edges.popleft()

    def time_left(self, num_rows_left: float, num_ready: float) -> TimeLeft | None:
        """None while nothing is known: before the first row, and without a ready replica."""
        if self._last is None or not num_ready:
            return None
        first, last = self._edges[0], self._last
        replica_s = last[2] - first[2]
        pace = (last[1] - first[1]) / replica_s if replica_s > 0 else 0.0
        if pace <= 0:
            return None
        eta_s = num_rows_left / (pace * num_ready)
        slices = [
            (after[1] - before[1]) / (after[2] - before[2])
            for before, after in itertools.pairwise(self._edges)
            if after[2] > before[2]
        ]
        if len(slices) < MIN_SLICES:
            return TimeLeft(eta_s)
        mean = sum(slices) / len(slices)
        deviation = math.sqrt(sum((it - mean) ** 2 for it in slices) / (len(slices) - 1))
        # The mean of the slices seen is uncertain, and so is that of the slices to come.
        slice_s = (self._edges[-1][0] - first[0]) / len(slices)
        num_to_come = max(1.0, eta_s / slice_s)
        share = 2.0 * deviation / pace * math.sqrt(1.0 / len(slices) + 1.0 / num_to_come)
        return TimeLeft(eta_s, eta_s / (1.0 + share), eta_s / (1.0 - share) if share < 1.0 else math.inf)
