"""Why a replica's engine has nothing to do: which stage of its units it waits for. The caller brings the time."""

import threading
from collections import Counter
from typing import Final, Literal

#: A unit's stages outside of the engine.
Stage = Literal["preparing", "publishing"]
#: What an idle engine waits for: rows being read and rendered, parts being published, or units that nobody assigned.
IdleCause = Literal["preparing", "publishing", "no_unit"]
IDLE_CAUSES: Final[tuple[IdleCause, ...]] = ("preparing", "publishing", "no_unit")


class IdleClock:
    """Sums the seconds in which the engine was idle by what it waited for. Any thread may call; starts out busy.

    With units in both stages the one being prepared is the cause: its rows are what the engine could do next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_idle = False
        self._num_units: Counter[Stage] = Counter()
        self._seconds: dict[IdleCause, float] = dict.fromkeys(IDLE_CAUSES, 0.0)
        self._since_s = 0.0

    def idle(self, now_s: float) -> None:
        """The engine has run out of sequences."""
        with self._lock:
            self._settle(now_s)
            self._is_idle = True

    def busy(self, now_s: float) -> None:
        """The engine has sequences again."""
        with self._lock:
            self._settle(now_s)
            self._is_idle = False

    def entered(self, stage: Stage, now_s: float) -> None:
        """A unit is in this stage from now on."""
        with self._lock:
            self._settle(now_s)
            self._num_units[stage] += 1

    def left(self, stage: Stage, now_s: float) -> None:
        """A unit has left this stage."""
        with self._lock:
            self._settle(now_s)
            self._num_units[stage] -= 1

    def seconds(self, now_s: float) -> dict[IdleCause, float]:
        """Idle seconds by cause, up to now."""
        with self._lock:
            self._settle(now_s)
            return dict(self._seconds)

    def _settle(self, now_s: float) -> None:
        """Put the time since the last change down to what was waited for since then."""
        if self._is_idle:
            self._seconds[self._cause()] += max(0.0, now_s - self._since_s)
        self._since_s = now_s

    def _cause(self) -> IdleCause:
        if self._num_units["preparing"]:
            return "preparing"
        return "publishing" if self._num_units["publishing"] else "no_unit"
