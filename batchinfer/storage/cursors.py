"""Streams over shards that are kept open between units, so that unit k+1 costs its own rows, not those before it."""

import threading
from typing import Generic, Protocol, TypeVar


class Cursor(Protocol):
    """An open shard and a position in it that only moves forward. Used by one thread at a time."""

    @property
    def shard_id(self) -> str:
        """Whose stream it is."""

    @property
    def position(self) -> int:
        """What it would read next: a row, or a byte."""

    @property
    def at_end(self) -> bool:
        """Whether nothing is left to read."""

    def close(self) -> None:
        """Let go of the shard."""


AnyCursor = TypeVar("AnyCursor", bound=Cursor)


class IdleCursors(Generic[AnyCursor]):
    """The most recently used cursors that no thread works with now.

    A lock per shard would make the slower of two units wait for the other's decoding, one cursor per unit would
    decode a shard's beginning each time.
    """

    def __init__(self, max_number: int) -> None:
        self._max_number = max_number
        self._lock = threading.Lock()
        self._idle: list[AnyCursor] = []

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, shard_id: str, position: int) -> AnyCursor | None:
        """The cursor of this shard closest before ``position``, or None; it is the caller's until it is kept again."""
        with self._lock:
            fitting = [it for it in self._idle if it.shard_id == shard_id and it.position <= position]
            if not fitting:
                return None
            nearest = max(fitting, key=lambda cursor: cursor.position)
            self._idle.remove(nearest)
            return nearest

    def keep(self, cursor: AnyCursor) -> None:
        """Lay a cursor aside for another unit; one at its end, or one too many, is closed."""
        with self._lock:
            if not cursor.at_end:
                self._idle.append(cursor)
                if len(self._idle) <= self._max_number:
                    return
                cursor = self._idle.pop(0)
        cursor.close()

    def close(self) -> None:
        """Close all of them; others may be kept again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for cursor in idle:
            cursor.close()
