"""Who generates which work unit, and what happens when something fails: a pure state machine.

Events come in, commands go out; time is a number inside the events. No Ray, no threads, no clock, so that
every order of events can be tried in a test. The driver executes the commands and feeds back what happened.

A work unit is *pending*, *leased* to one replica, *committed*, or *given up* after ``max_attempts`` failures.
A replica is *starting*, *ready*, or gone. Execution is at-least-once: a replica may die after its unit was
committed, so a unit may be leased again although its part exists; the writer refuses the second part and
reports the unit committed, which is why nothing here has to be exact about deaths.

Two rules are worth knowing before reading on:

* **Suspects run alone.** When a replica dies, every unit it held may be the culprit. Each is leased again, but
  with nothing beside it, so a second death names the culprit and its neighbours do not use up their attempts.
* **Depth follows capacity.** A replica holds at least ``units_in_flight`` units and as many more as it takes
  to keep twice its engine's capacity submitted, but never more than its fair share of what is left.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from batchinfer.records import WorkUnit

ReplicaId = int
UnitId = str


# Events: what happened, and when (seconds on the driver's monotonic clock) -----------------------------


@dataclass(frozen=True, slots=True)
class ReplicasWanted:
    """The cluster has room for this many replicas."""

    num_replicas: int
    at_s: float


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded its model; its engine works on ``capacity`` sequences at once."""

    replica_id: ReplicaId
    capacity: int
    at_s: float


@dataclass(frozen=True, slots=True)
class ReplicaStartFailed:
    """A replica could not load. ``final`` means that no other will be able to either."""

    replica_id: ReplicaId
    error: str
    final: bool
    at_s: float


@dataclass(frozen=True, slots=True)
class ReplicaDied:
    """A ready or starting replica is gone, with everything it held."""

    replica_id: ReplicaId
    error: str
    at_s: float


@dataclass(frozen=True, slots=True)
class UnitCommitted:
    """The unit's part exists."""

    replica_id: ReplicaId
    unit_id: UnitId
    at_s: float


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """The unit could not be finished, but its replica lives (storage, say)."""

    replica_id: ReplicaId
    unit_id: UnitId
    error: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent at :attr:`WorkQueue.wake_at_s`."""

    at_s: float


Event = ReplicasWanted | ReplicaReady | ReplicaStartFailed | ReplicaDied | UnitCommitted | UnitFailed | Tick


# Commands: what the driver is to do --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start an actor under this id; answer with ReplicaReady, ReplicaStartFailed or ReplicaDied."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End this actor; no answer is expected and late ones are ignored."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Assign:
    """Have the replica generate the unit; answer with UnitCommitted, UnitFailed or ReplicaDied."""

    replica_id: ReplicaId
    unit: WorkUnit
    attempt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more can be done. Sent exactly once, last."""

    outcome: Literal["done", "given_up", "cannot_start", "replicas_keep_dying", "job_error"]
    error: str = ""


Command = StartReplica | StopReplica | Assign | Finish


# State -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Replica:
    replica_id: ReplicaId
    capacity: int = 0
    ready: bool = False
    #: Holds one suspect and must get nothing beside it.
    alone: bool = False
    units: dict[UnitId, None] = field(default_factory=dict)
    num_rows_leased: int = 0


@dataclass(slots=True)
class _Attempts:
    """Failures of one unit so far; only units that failed have one."""

    num_failures: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A unit that failed on every attempt of this run."""

    unit: WorkUnit
    num_attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Limits, from the job's ``execution`` block."""

    max_attempts: int = 3
    max_start_attempts: int = 3
    units_in_flight: int = 2
    #: However small the units are, a replica holds no more.
    max_units_held: int = 64
    samples_per_row: int = 1
    #: A failed unit or start waits this long times two for each earlier failure, up to ``max_backoff_s``.
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def backoff_after(self, num_failures: int) -> float:
        """Seconds to wait after the ``num_failures``-th failure in a row."""
        return min(self.backoff_s * 2.0 ** (num_failures - 1), self.max_backoff_s)


class WorkQueue:
    """Feed :meth:`handle` every event in the order it happened; execute what it returns in order."""

    def __init__(self, units: Iterable[WorkUnit], policy: QueuePolicy) -> None:
        self._policy = policy
        self._units: dict[UnitId, WorkUnit] = {unit.unit_id: unit for unit in units}
        self._pending: deque[UnitId] = deque(self._units)
        self._suspects: deque[UnitId] = deque()
        self._delayed: list[tuple[float, UnitId]] = []
        self._holder: dict[UnitId, ReplicaId] = {}
        self._attempts: dict[UnitId, _Attempts] = {}
        self._committed: set[UnitId] = set()
        self.given_up: list[GivenUp] = []
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._next_replica_id = 0
        self._num_ready = 0
        self._num_wanted = 0
        self._num_start_failures = 0
        self._num_deaths_since_commit = 0
        self._may_start_at_s = 0.0
        self._finished = False

    # What the driver and the progress view read ----------------------------------------------------

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def num_committed(self) -> int:
        return len(self._committed)

    @property
    def num_pending(self) -> int:
        return len(self._pending) + len(self._suspects) + len(self._delayed)

    @property
    def num_leased(self) -> int:
        return len(self._holder)

    @property
    def num_ready(self) -> int:
        return self._num_ready

    @property
    def num_starting(self) -> int:
        return len(self._replicas) - self._num_ready

    @property
    def wake_at_s(self) -> float | None:
        """When a Tick is due although nothing may happen before: a backoff ends. None = never."""
        times = [at_s for at_s, _ in self._delayed]
        if len(self._replicas) < self._num_useful():
            times.append(self._may_start_at_s)
        return min(times, default=None)

    # Transitions ------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Advance by one event. Events of replicas that are gone, and repeated ones, change nothing."""
        if self._finished:
            return []
        commands: list[Command] = []
        match event:
            case ReplicasWanted(num_replicas=num_replicas):
                self._num_wanted = num_replicas
            case ReplicaReady(replica_id=replica_id, capacity=capacity):
                self._replica_ready(replica_id, capacity)
            case ReplicaStartFailed(replica_id=replica_id, error=error, final=final, at_s=at_s):
                commands += self._start_failed(replica_id, error, final, at_s)
            case ReplicaDied(replica_id=replica_id, error=error, at_s=at_s):
                commands += self._replica_died(replica_id, error, at_s)
            case UnitCommitted(replica_id=replica_id, unit_id=unit_id):
                self._unit_committed(replica_id, unit_id)
            case UnitFailed(replica_id=replica_id, unit_id=unit_id, error=error, at_s=at_s):
                self._unit_failed(replica_id, unit_id, error, at_s)
            case Tick():
                pass
        if self._finished:
            return commands
        self._release_delayed(event.at_s)
        if not (self._pending or self._suspects or self._delayed or self._holder):
            return commands + self._finish("given_up" if self.given_up else "done", "")
        return commands + self._resize(event.at_s) + self._feed()

    def _replica_ready(self, replica_id: ReplicaId, capacity: int) -> None:
        replica = self._replicas.get(replica_id)
        if replica is not None and not replica.ready:
            replica.ready, replica.capacity = True, max(1, capacity)
            self._num_ready += 1
            self._num_start_failures = 0

    def _start_failed(self, replica_id: ReplicaId, error: str, final: bool, at_s: float) -> list[Command]:
        replica = self._replicas.get(replica_id)
        if replica is None or replica.ready:
            return []
        del self._replicas[replica_id]
        self._num_start_failures += 1
        if final:
            return self._finish("job_error", error)
        if self._num_start_failures >= self._policy.max_start_attempts and not self._num_ready:
            return self._finish("cannot_start", error)
        self._may_start_at_s = at_s + self._policy.backoff_after(self._num_start_failures)
        return []

    def _replica_died(self, replica_id: ReplicaId, error: str, at_s: float) -> list[Command]:
        replica = self._replicas.get(replica_id)
        if replica is None:
            return []
        if not replica.ready:
            return self._start_failed(replica_id, error, False, at_s)
        del self._replicas[replica_id]
        self._num_ready -= 1
        self._num_deaths_since_commit += 1
        for unit_id in replica.units:
            del self._holder[unit_id]
            # A neighbour of the culprit is not charged: only a unit that was alone is known to be guilty.
            charged = replica.alone or len(replica.units) == 1
            if not (charged and self._charge(unit_id, error)):
                self._suspects.append(unit_id)
        # Every attempt of every unit can end in a death; more deaths than that without one commit in between
        # are the machine's doing, and starting replicas for ever would only burn money.
        limit = self._policy.max_attempts * (self._policy.units_in_flight + 1) + self._num_wanted
        if self._num_deaths_since_commit > limit:
            return self._finish("replicas_keep_dying", error)
        return []

    def _unit_committed(self, replica_id: ReplicaId, unit_id: UnitId) -> None:
        if unit_id not in self._units or unit_id in self._committed:
            return
        if self._holder.get(unit_id) == replica_id:
            self._release(unit_id)
            self._committed.add(unit_id)
            self._attempts.pop(unit_id, None)
            self._num_deaths_since_commit = 0

    def _unit_failed(self, replica_id: ReplicaId, unit_id: UnitId, error: str, at_s: float) -> None:
        if self._holder.get(unit_id) != replica_id:
            return
        self._release(unit_id)
        if not self._charge(unit_id, error):
            backoff_s = self._policy.backoff_after(self._attempts[unit_id].num_failures)
            self._delayed.append((at_s + backoff_s, unit_id))

    def _release(self, unit_id: UnitId) -> None:
        replica = self._replicas[self._holder.pop(unit_id)]
        del replica.units[unit_id]
        replica.num_rows_leased -= self._units[unit_id].num_rows
        replica.alone = False

    def _charge(self, unit_id: UnitId, error: str) -> bool:
        """Count a failure; True when it was the last one allowed and the unit is given up."""
        attempts = self._attempts.setdefault(unit_id, _Attempts())
        attempts.num_failures += 1
        attempts.last_error = error
        if attempts.num_failures < self._policy.max_attempts:
            return False
        self.given_up.append(GivenUp(self._units[unit_id], attempts.num_failures, error))
        return True

    def _release_delayed(self, at_s: float) -> None:
        if self._delayed and min(self._delayed)[0] <= at_s:
            self._pending.extendleft(unit_id for due_s, unit_id in sorted(self._delayed, reverse=True) if due_s <= at_s)
            self._delayed = [(due_s, unit_id) for due_s, unit_id in self._delayed if due_s > at_s]

    def _num_useful(self) -> int:
        """Replicas that could have work: never more than there are units left."""
        return min(self._num_wanted, self.num_pending + len(self._holder))

    def _resize(self, at_s: float) -> list[Command]:
        """Start replicas the cluster has room for; drop starting ones it lost the room for."""
        commands: list[Command] = []
        if at_s >= self._may_start_at_s:
            while len(self._replicas) < self._num_useful():
                replica_id, self._next_replica_id = self._next_replica_id, self._next_replica_id + 1
                self._replicas[replica_id] = _Replica(replica_id)
                commands.append(StartReplica(replica_id))
        if len(self._replicas) > self._num_wanted:
            starting = [replica_id for replica_id, replica in self._replicas.items() if not replica.ready]
            for replica_id in starting[: len(self._replicas) - self._num_wanted]:
                del self._replicas[replica_id]
                commands.append(StopReplica(replica_id))
        return commands

    def _feed(self) -> list[Command]:
        """Lease units, emptiest replica first, until every ready replica holds enough or nothing is left."""
        commands: list[Command] = []
        if not self._num_ready or not (self._pending or self._suspects):
            return commands
        by_load = sorted((r for r in self._replicas.values() if r.ready), key=lambda r: (len(r.units), r.replica_id))
        for replica in by_load:
            if self._suspects and not replica.units:
                commands.append(self._lease(replica, self._suspects.popleft()))
                replica.alone = True
        # With no empty replica in sight the emptiest one runs dry for the next suspect.
        drying = by_load[0] if self._suspects and not self.num_starting else None
        # Starting replicas count: the first one ready must not take what the others will want a minute later.
        fair_share = -(-(self.num_pending + len(self._holder)) // len(self._replicas))
        hungry = deque(r for r in by_load if r is not drying and self._wants_more(r, fair_share))
        while hungry and self._pending:
            replica = hungry.popleft()
            commands.append(self._lease(replica, self._pending.popleft()))
            if self._wants_more(replica, fair_share):
                hungry.append(replica)
        return commands

    def _wants_more(self, replica: _Replica, fair_share: int) -> bool:
        if replica.alone:
            return False
        if len(replica.units) < self._policy.units_in_flight:
            return True
        submitted = replica.num_rows_leased * self._policy.samples_per_row
        limit = min(fair_share, self._policy.max_units_held)
        return submitted < 2 * replica.capacity and len(replica.units) < limit

    def _lease(self, replica: _Replica, unit_id: UnitId) -> Assign:
        unit = self._units[unit_id]
        replica.units[unit_id] = None
        replica.num_rows_leased += unit.num_rows
        self._holder[unit_id] = replica.replica_id
        attempts = self._attempts.get(unit_id)
        return Assign(replica.replica_id, unit, 1 + (attempts.num_failures if attempts else 0))

    def _finish(
        self, outcome: Literal["done", "given_up", "cannot_start", "replicas_keep_dying", "job_error"], error: str
    ) -> list[Command]:
        self._finished = True
        commands: list[Command] = [StopReplica(replica_id) for replica_id in self._replicas]
        self._replicas.clear()
        self._num_ready = 0
        return [*commands, Finish(outcome, error)]

    # Self-check ---------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError where an invariant is broken; tests call it after every event."""
        waiting = [*self._pending, *self._suspects, *(unit_id for _, unit_id in self._delayed)]
        given_up = [record.unit.unit_id for record in self.given_up]
        places = [*waiting, *self._holder, *self._committed, *given_up]
        assert len(places) == len(set(places)), "a unit is in two places"
        assert set(places) == set(self._units), "a unit is nowhere"
        if not self._finished:
            held = {unit_id: replica.replica_id for replica in self._replicas.values() for unit_id in replica.units}
            assert held == self._holder, "leases and holders differ"
            assert waiting or self._holder, "unfinished with nothing left to do"
            assert self._num_ready == sum(replica.ready for replica in self._replicas.values()), "ready miscounted"
        for replica in self._replicas.values():
            assert replica.ready or not replica.units, "a starting replica holds units"
            assert not replica.alone or len(replica.units) == 1, "a suspect has company"
            rows = sum(self._units[unit_id].num_rows for unit_id in replica.units)
            assert rows == replica.num_rows_leased, "leased rows miscounted"
