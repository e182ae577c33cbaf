"""Why a replica's engine has nothing to do: which stage of its units it waits for."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

#: Where a unit is. While its sequences are generated the engine waits only for the next turns of conversations.
Stage = Literal["preparing", "generating", "publishing"]
#: What an idle engine waits for, the first that is true: rows being read and rendered, next turns, parts being
#: published, units that nobody assigned.
IdleCause = Literal["rows", "next_turns", "publishing", "units"]
IDLE_CAUSES: Final[tuple[IdleCause, ...]] = ("rows", "next_turns", "publishing", "units")


class IdleClock:
    """Sums the seconds in which the engine was idle by what it waited for. Any thread may call; starts out busy."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._is_idle = False
        self._num_units: Counter[Stage] = Counter()
        self._seconds: dict[IdleCause, float] = dict.fromkeys(IDLE_CAUSES, 0.0)
        self._since_s = clock()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """The engine has no sequences inside the block."""
        self._change(is_idle=True)
        try:
            yield
        finally:
            self._change(is_idle=False)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """A unit is in this stage inside the block."""
        self._move(stage, 1)
        try:
            yield
        finally:
            self._move(stage, -1)

    def seconds(self) -> dict[IdleCause, float]:
        """Idle seconds by cause, up to now."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _change(self, *, is_idle: bool) -> None:
        with self._lock:
            self._settle()
            self._is_idle = is_idle

    def _move(self, stage: Stage, number: int) -> None:
        with self._lock:
            self._settle()
            self._num_units[stage] += number

    def _settle(self) -> None:
        """Put the time since the last change down to what was waited for since then."""
        now_s = self._clock()
        if self._is_idle:
            self._seconds[self._cause()] += now_s - self._since_s
        self._since_s = now_s

    def _cause(self) -> IdleCause:
        if self._num_units["preparing"]:
            return "rows"
        if self._num_units["generating"]:
            return "next_turns"
        return "publishing" if self._num_units["publishing"] else "units"
