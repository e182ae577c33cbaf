"""Run events: one JSON object per line, appended while a run goes on, read by status, report and post-mortems."""

import io
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from typing import Protocol

from batchinfer.storage.layout import RUNS, staging
from batchinfer.storage.location import Location

#: A value of an event; what JSON can say.
EventValue = str | int | float | bool | None | list["EventValue"] | dict[str, "EventValue"]
Event = dict[str, EventValue]
Clock = Callable[[], datetime]

#: Object stores: a segment is put at most this often, for each is a request and an object.
SEGMENT_INTERVAL_S = 5.0


class EventLog(Protocol):
    """Where a run writes what happens. Any thread may write; events keep the order of the calls."""

    def add(self, event: str, at: datetime | None = None, /, **fields: EventValue) -> None:
        """Hold an event for the next flush: ``{"at": <UTC, ISO 8601>, "event": event, **fields}``.

        It happened ``at`` that moment, by default at this one.
        """

    def flush(self) -> None:
        """Store what is held, as soon as the storage is meant to be asked again."""

    def write(self, event: str, **fields: EventValue) -> None:
        """``add`` and ``flush``."""

    def close(self) -> None:
        """Store what is still held back. May be called again."""


def open_event_log(output: Location, run_id: str, clock: Clock = lambda: datetime.now(UTC)) -> EventLog:
    """The event log of a run of this output; the storage decides the kind."""
    runs = output.child(RUNS)
    if runs.can_append:
        return AppendedEvents(runs.child(f"{run_id}.jsonl"), clock)
    return SegmentedEvents(runs, run_id, staging(output), clock)


class _HeldEvents(ABC):
    """The lines between ``add`` and ``flush``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: list[bytes] = []

    def add(self, event: str, at: datetime | None = None, /, **fields: EventValue) -> None:
        with self._lock:
            self._held.append(_line(at or self._clock(), event, fields))

    def write(self, event: str, **fields: EventValue) -> None:
        self.add(event, **fields)
        self.flush()

    @abstractmethod
    def flush(self) -> None: ...


class AppendedEvents(_HeldEvents):
    """Events are in the file when ``flush`` returns; a crash may tear the last line, never an earlier one."""

    def __init__(self, file: Location, clock: Clock) -> None:
        super().__init__(clock)
        self._file = file

    def flush(self) -> None:
        with self._lock:
            if self._held:
                # One append however many there are: opening the file costs more than all else.
                self._file.append(b"".join(self._held))
                self._held = []

    def close(self) -> None:
        self.flush()


class SegmentedEvents(_HeldEvents):
    """Events gathered into objects ``<run id>-<k>.jsonl``; a crash loses those since the last object was put."""

    def __init__(self, runs: Location, run_id: str, staging_directory: Location, clock: Clock) -> None:
        super().__init__(clock)
        self._runs = runs
        self._run_id = run_id
        self._staging = staging_directory
        self._num_segments = 0
        self._last_put_at = clock()

    def flush(self) -> None:
        with self._lock:
            now = self._clock()
            if self._held and (now - self._last_put_at).total_seconds() >= SEGMENT_INTERVAL_S:
                self._put(now)

    def close(self) -> None:
        with self._lock:
            if self._held:
                self._put(self._clock())

    def _put(self, now: datetime) -> None:
        segment = self._runs.child(f"{self._run_id}-{self._num_segments:06d}.jsonl")
        segment.write_replace(b"".join(self._held), self._staging)
        self._held = []
        self._num_segments += 1
        self._last_put_at = now


def read_events(output: Location, kinds: Collection[str] = ()) -> Iterator[Event]:
    """The events of all runs, run by run in the order of run ids, each run's in the order they were written.

    Only those of ``kinds`` where any are given, which costs a fraction of reading all. One file is held in memory at a
    time. A line that is no event (torn by a crash) is left out.
    """
    runs = output.child(RUNS)
    marks = [f'"event": {json.dumps(kind)}'.encode() for kind in kinds]
    for name in sorted(runs.names()):
        if not name.endswith(".jsonl"):
            continue
        # A list of the lines would take as much memory again.
        for line in io.BytesIO(runs.child(name).read_if_present() or b""):
            if marks and not any(mark in line for mark in marks):
                continue
            try:
                # json would find out each line's encoding first.
                event = json.loads(line.decode())
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event and (not kinds or event["event"] in kinds):
                yield event


def _line(at: datetime, event: str, fields: Event) -> bytes:
    return json.dumps({"at": at.isoformat(), "event": event, **fields}, ensure_ascii=False).encode() + b"\n"
