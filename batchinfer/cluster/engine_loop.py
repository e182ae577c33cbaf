"""The one thread that drives the engine, and the desk where other threads leave sequences and wait for them.

Rows of several work units meet in the engine here: each unit's thread calls :meth:`EngineLoop.generate`, and
the loop hands every generation back to the unit it came from. Nothing else runs on the loop's thread, so the
device waits for the engine's own work only. Every now and then the loop tells each caller how far its sequences
have come, between two steps; what becomes of that (a journal) is the matter of other threads.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from batchinfer.engine.engine import Engine, EngineStats, Generation, Partial, Sequence


class EngineFailed(Exception):
    """The engine raised; it and its replica are unusable. ``__cause__`` is what it raised."""


class EngineClosed(Exception):
    """The loop was closed while sequences were waiting."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a caller's sequences have come: those that ended since the snapshot before, and those in progress."""

    ended: tuple[Generation, ...] = ()
    in_progress: tuple[Partial, ...] = ()


#: Takes a snapshot on the engine's thread: it must return at once and not raise.
OnSnapshot = Callable[[Snapshot], None]


@dataclass(slots=True, eq=False)
class _Ticket:
    """One caller's sequences: how many are missing, and what came back so far."""

    num_missing: int
    on_snapshot: OnSnapshot
    generations: list[Generation] = field(default_factory=list)
    #: Generations that snapshots have told of.
    num_told: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def tell(self, in_progress: SequenceOf[Partial]) -> None:
        ended = tuple(self.generations[self.num_told :])
        self.num_told = len(self.generations)
        if ended or in_progress:
            self.on_snapshot(Snapshot(ended, tuple(in_progress)))


class EngineLoop:
    """Runs ``engine`` on a thread of its own from construction to :meth:`close`.

    Callers get snapshots ``snapshot_interval_s`` apart while the engine works.
    """

    def __init__(self, engine: Engine, snapshot_interval_s: float = math.inf) -> None:
        self._engine = engine
        self._snapshot_interval_s = snapshot_interval_s
        self._snapshot_at_s = math.inf
        self._inbox: queue.SimpleQueue[tuple[SequenceOf[Sequence], _Ticket] | None] = queue.SimpleQueue()
        self._tickets: dict[tuple[str, int], _Ticket] = {}
        self._failure: BaseException | None = None
        self._closed = False
        self._idle_s = 0.0
        self._idle_since_s: float | None = None
        #: Held where callers come and go and where they are given something, so that a close finds all of them.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What the engine raised, or None while it works."""
        return self._failure

    @property
    def idle_s(self) -> float:
        """How long the engine has had nothing to do so far."""
        since_s = self._idle_since_s
        return self._idle_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self, sequences: Iterable[Sequence], on_snapshot: OnSnapshot = lambda snapshot: None
    ) -> list[Generation]:
        """Block until every sequence has ended; returns them in the order they ended.

        Any number of threads may wait here at once. No two sequences in flight may share an id. Before an exception
        leaves, ``on_snapshot`` has been told of all that ended; after a close that waited for the engine's step, of
        all that is in progress too.

        Raises:
            EngineFailed: the engine raised, now or before.
            EngineClosed: :meth:`close` was called, meanwhile or before.
        """
        batch = tuple(sequences)
        if not batch:
            return []
        ticket = _Ticket(len(batch), on_snapshot)
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

    def close(self, timeout_s: float | None = None) -> None:
        """Stop after the current step; callers still waiting get EngineClosed. Safe to call twice.

        A step that takes longer than ``timeout_s`` is not waited for: its callers go without the tokens since their
        last snapshot, and what the step still brings is dropped.
        """
        self._inbox.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._end(None, [])

    def _run(self) -> None:
        error: BaseException | None = None
        in_progress: list[Partial] = []
        try:
            while self._take_new():
                generations = self._engine.step()
                with self._lock:
                    if self._closed:
                        break
                    for generation in generations:
                        self._deliver(generation)
                if time.monotonic() >= self._snapshot_at_s:
                    self._tell(self._engine.in_progress())
            in_progress = self._engine.in_progress()
        except BaseException as raised:  # noqa: BLE001 - handed to every waiting caller, which raises it
            error = raised
        self._end(error, in_progress)
        self._engine.close()

    def _take_new(self) -> bool:
        """Submit what has arrived, waiting only when the engine has nothing to do; False = closed."""
        while True:
            is_idle = self._engine.num_unfinished == 0
            try:
                item = self._wait_for_work() if is_idle else self._inbox.get(block=False)
            except queue.Empty:
                return True
            if item is None:
                return False
            sequences, ticket = item
            self._tickets.update((sequence.sequence_id, ticket) for sequence in sequences)
            self._engine.submit(sequences)

    def _wait_for_work(self) -> "tuple[SequenceOf[Sequence], _Ticket] | None":
        since_s = self._idle_since_s = time.monotonic()
        item = self._inbox.get()
        now_s = time.monotonic()
        self._idle_since_s = None
        self._idle_s += now_s - since_s
        # Work that is done within the interval is told of by its end alone.
        self._snapshot_at_s = now_s + self._snapshot_interval_s
        return item

    def _deliver(self, generation: Generation) -> None:
        ticket = self._tickets.pop(generation.sequence.sequence_id)
        ticket.generations.append(generation)
        ticket.num_missing -= 1
        if ticket.num_missing == 0:
            ticket.done.set()

    def _tell(self, in_progress: SequenceOf[Partial]) -> None:
        with self._lock:
            if self._closed:
                return
            partials_of: dict[_Ticket, list[Partial]] = {ticket: [] for ticket in self._tickets.values()}
            for partial in in_progress:
                partials_of[self._tickets[partial.sequence.sequence_id]].append(partial)
            for ticket, partials in partials_of.items():
                ticket.tell(partials)
        self._snapshot_at_s = time.monotonic() + self._snapshot_interval_s

    def _end(self, error: BaseException | None, in_progress: SequenceOf[Partial]) -> None:
        """Tell every waiting caller how far it has come, then wake it; only the first of two ends does it."""
        self._tell(in_progress)
        with self._lock:
            if self._closed:
                return
            self._failure, self._closed = error, error is None
            waiting = set(self._tickets.values())
            while not self._inbox.empty():
                if (item := self._inbox.get()) is not None:
                    waiting.add(item[1])
            for ticket in waiting:
                ticket.error = error
                ticket.done.set()
