"""The one thread that drives the engine, and the desk where other threads leave sequences and wait for them.

Rows of several work units meet in the engine here: each unit's thread calls :meth:`EngineLoop.generate`, and
the loop hands every generation back to the unit it came from. Nothing else runs on the loop's thread, so the
device waits for the engine's own work only.
"""

import queue
import threading
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from batchinfer.engine.engine import Engine, EngineStats, Generation, Sequence


class EngineFailed(Exception):
    """The engine raised; it and its replica are unusable. ``__cause__`` is what it raised."""


class EngineClosed(Exception):
    """The loop was closed while sequences were waiting."""


@dataclass(slots=True)
class _Ticket:
    """One caller's sequences: how many are missing, and what came back so far."""

    num_missing: int
    generations: list[Generation] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class EngineLoop:
    """Runs ``engine`` on a thread of its own from construction to :meth:`close`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[SequenceOf[Sequence], _Ticket] | None] = queue.SimpleQueue()
        self._tickets: dict[tuple[str, int], _Ticket] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What the engine raised, or None while it works."""
        return self._failure

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(self, sequences: Iterable[Sequence]) -> list[Generation]:
        """Block until every sequence has ended; returns them in the order they ended.

        Any number of threads may wait here at once. No two sequences in flight may share an id.

        Raises:
            EngineFailed: the engine raised, now or before.
            EngineClosed: :meth:`close` was called, meanwhile or before.
        """
        batch = tuple(sequences)
        if not batch:
            return []
        ticket = _Ticket(len(batch))
        with self._lock:
            if self._closed:
                raise EngineClosed("the replica is closing")
            if self._failure is not None:
                raise EngineFailed(str(self._failure)) from self._failure
            self._inbox.put((batch, ticket))
        ticket.done.wait()
        if ticket.error is not None:
            raise EngineFailed(str(ticket.error)) from ticket.error
        if ticket.num_missing:
            raise EngineClosed("the replica is closing")
        return ticket.generations

    def close(self) -> None:
        """Stop after the current step; callers still waiting get EngineClosed. Safe to call twice."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._take_new():
                for generation in self._engine.step():
                    self._deliver(generation)
        except BaseException as raised:  # noqa: BLE001 - handed to every waiting caller, which raises it
            error = raised
        with self._lock:
            self._failure, self._closed = error, error is None
            waiting = {id(ticket): ticket for ticket in self._tickets.values()}
            while not self._inbox.empty():
                if (item := self._inbox.get()) is not None:
                    waiting[id(item[1])] = item[1]
        for ticket in waiting.values():
            ticket.error = error
            ticket.done.set()
        self._engine.close()

    def _take_new(self) -> bool:
        """Submit what has arrived, waiting only when the engine has nothing to do; False = closed."""
        while True:
            try:
                item = self._inbox.get(block=self._engine.num_unfinished == 0)
            except queue.Empty:
                return True
            if item is None:
                return False
            sequences, ticket = item
            self._tickets.update((sequence.sequence_id, ticket) for sequence in sequences)
            self._engine.submit(sequences)

    def _deliver(self, generation: Generation) -> None:
        ticket = self._tickets.pop(generation.sequence.sequence_id)
        ticket.generations.append(generation)
        ticket.num_missing -= 1
        if ticket.num_missing == 0:
            ticket.done.set()
