"""The one thread that drives the engine, and the desk where other threads leave sequences and wait for them.

Rows of several work units meet in the engine here: each unit's thread calls :meth:`EngineLoop.generate`, and
the loop hands every generation back to the unit it came from. Nothing else runs on the loop's thread, so the
device waits for the engine's own work only. Every now and then the loop tells each caller how far its sequences
have come, between two steps; what becomes of that (a journal) is the matter of other threads. So is the next turn of
a conversation: it is made of the answer as soon as that is there, and joins the batch while the others go on.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from batchinfer.cluster.idle_clock import IdleClock
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
#: The sequence that goes on behind one that ended, or the end of a row whose next turn cannot be asked.
FollowUp = Callable[[Generation], Sequence | Generation]

#: Threads that make next turns: few, as each keeps memory, but apart from those that units are prepared on, since the
#: batch is waiting for a turn and not for a unit.
NUM_FOLLOW_UP_THREADS = 2


@dataclass(slots=True, eq=False)
class _Ticket:
    """One caller's sequences: how many are missing, and what came back so far."""

    num_missing: int
    on_snapshot: OnSnapshot
    follow_up: FollowUp | None
    generations: list[Generation] = field(default_factory=list)
    #: Generations that snapshots have told of.
    num_told: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    #: What the engine raised; and what a follow-up raised, which is its caller's affair alone.
    failure: BaseException | None = None
    error: Exception | None = None

    def tell(self, in_progress: SequenceOf[Partial]) -> None:
        ended = tuple(self.generations[self.num_told :])
        self.num_told = len(self.generations)
        if ended or in_progress:
            self.on_snapshot(Snapshot(ended, tuple(in_progress)))


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What the engine's thread is to take from the desk before its next step."""

    ticket: _Ticket
    sequences: SequenceOf[Sequence] = ()
    #: Ids of sequences that have ended, whose next turns will not come.
    without_next_turn: SequenceOf[tuple[str, int]] = ()


class EngineLoop:
    """Runs ``engine`` on a thread of its own from construction to :meth:`close`.

    Callers get snapshots ``snapshot_interval_s`` apart while the engine works.
    """

    def __init__(
        self, engine: Engine, snapshot_interval_s: float = math.inf, idle_clock: IdleClock | None = None
    ) -> None:
        """``idle_clock`` is told when the engine has nothing to do; None = nobody asks why."""
        self._engine = engine
        #: What its idle time is spent waiting for.
        self.idle_clock = idle_clock or IdleClock()
        self._snapshot_interval_s = snapshot_interval_s
        self._snapshot_at_s = math.inf
        self._inbox: queue.SimpleQueue[_Arrival | None] = queue.SimpleQueue()
        #: Of the sequences in the engine; and all whose callers wait, those that wait for nothing but next turns too.
        self._tickets: dict[tuple[str, int], _Ticket] = {}
        self._waiting: set[_Ticket] = set()
        self._followers = ThreadPoolExecutor(NUM_FOLLOW_UP_THREADS, thread_name_prefix="turns")
        self._failure: BaseException | None = None
        self._closed = False
        #: Held where callers come and go and where they are given something, so that a close finds all of them.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What the engine raised, or None while it works."""
        return self._failure

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self,
        sequences: Iterable[Sequence],
        on_snapshot: OnSnapshot = lambda snapshot: None,
        follow_up: FollowUp | None = None,
    ) -> list[Generation]:
        """Block until every sequence has ended; returns them in the order they ended.

        With ``follow_up`` each sequence that has a next turn is followed by what it makes of its end, on threads of the
        loop's own; all turns are waited for and returned. Any number of threads may wait here at once. No two sequences
        in flight may share an id. Before an exception leaves, ``on_snapshot`` has been told of all that ended; after a
        close that waited for the engine's step, of all that is in progress too.

        Raises:
            EngineFailed: the engine raised, now or before.
            EngineClosed: :meth:`close` was called, meanwhile or before.
            Exception: what ``follow_up`` raised, once the other sequences have ended.
        """
        batch = tuple(sequences)
        if not batch:
            return []
        ticket = _Ticket(len(batch), on_snapshot, follow_up)
        with self._lock:
            if self._closed:
                raise EngineClosed("the replica is closing")
            if self._failure is not None:
                raise EngineFailed(str(self._failure)) from self._failure
            self._waiting.add(ticket)
            self._inbox.put(_Arrival(ticket, batch))
        ticket.done.wait()
        if ticket.failure is not None:
            raise EngineFailed(str(ticket.failure)) from ticket.failure
        if ticket.num_missing:
            raise EngineClosed("the replica is closing")
        if ticket.error is not None:
            raise ticket.error
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
            if item.without_next_turn:
                self._engine.abort(item.without_next_turn)
            self._tickets.update((sequence.sequence_id, item.ticket) for sequence in item.sequences)
            self._engine.submit(item.sequences)

    def _wait_for_work(self) -> "_Arrival | None":
        with self._lock:
            # Between two turns of a unit's last rows the engine may idle, but the unit's news get no younger.
            is_in_between = bool(self._waiting) and self._snapshot_at_s < math.inf
        with self.idle_clock.idle():
            item = self._inbox.get()
        if not is_in_between:
            # Work that is done within the interval is told of by its end alone.
            self._snapshot_at_s = time.monotonic() + self._snapshot_interval_s
        return item

    def _deliver(self, generation: Generation) -> None:
        ticket = self._tickets.pop(generation.sequence.sequence_id)
        ticket.generations.append(generation)
        if generation.is_followed and ticket.follow_up is not None:
            self._followers.submit(self._follow, ticket, generation)
        else:
            self._one_less(ticket)

    def _one_less(self, ticket: _Ticket) -> None:
        ticket.num_missing -= 1
        if ticket.num_missing == 0:
            self._waiting.discard(ticket)
            ticket.done.set()

    def _follow(self, ticket: _Ticket, generation: Generation) -> None:
        """Ask a conversation's next turn. A crash before it has come far costs that turn, not the ones before it."""
        assert ticket.follow_up is not None
        following: Sequence | Generation | None = None
        try:
            if ticket.error is None:
                following = ticket.follow_up(generation)
        except Exception as error:  # noqa: BLE001 - raised by the caller, when its other sequences have left the engine
            ticket.error = error
        with self._lock:
            if ticket.done.is_set():
                return
            if isinstance(following, Sequence):
                self._inbox.put(_Arrival(ticket, (following,)))
                return
            self._inbox.put(_Arrival(ticket, without_next_turn=(generation.sequence.sequence_id,)))
            if following is not None:
                ticket.generations.append(following)
            self._one_less(ticket)

    def _tell(self, in_progress: SequenceOf[Partial]) -> None:
        with self._lock:
            if self._closed:
                return
            partials_of: dict[_Ticket, list[Partial]] = {ticket: [] for ticket in self._waiting}
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
            for ticket in self._waiting:
                ticket.failure = error
                ticket.done.set()
            self._waiting.clear()
        self._followers.shutdown(wait=False, cancel_futures=True)
