"""What goes into the work queue and what comes out of it: events that happened, commands for the driver."""

from dataclasses import dataclass
from typing import Literal

from batchinfer.records import WorkUnit

ReplicaId = int
UnitId = str


# Events: what happened, and when (seconds on the driver's monotonic clock) -----------------------------


@dataclass(frozen=True, slots=True)
class ReplicasWanted:
    """The cluster has room for this many replicas, those on nodes about to go not counted."""

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
    """A ready or starting replica is gone, with everything it held.

    ``blameless``: nothing it held can be the reason, since its node went or the driver ended it.
    """

    replica_id: ReplicaId
    error: str
    at_s: float
    blameless: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaProgressed:
    """A replica was asked how it goes; the counter grows with everything it does."""

    replica_id: ReplicaId
    num_signs_of_life: int
    at_s: float


@dataclass(frozen=True, slots=True)
class ReplicaEvicted:
    """The replica's node is about to go: it gets nothing more, and what it holds is saved."""

    replica_id: ReplicaId
    at_s: float


@dataclass(frozen=True, slots=True)
class ReplicaDrained:
    """The replica has journaled what it held and generates nothing any more."""

    replica_id: ReplicaId
    at_s: float


@dataclass(frozen=True, slots=True)
class UnitCommitted:
    """The unit's part exists."""

    replica_id: ReplicaId
    unit_id: UnitId
    at_s: float


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """The unit, or a probe of it, could not be finished, but its replica lives (storage, say)."""

    replica_id: ReplicaId
    unit_id: UnitId
    error: str
    at_s: float


@dataclass(frozen=True, slots=True)
class UnitProbed:
    """The rows of the unit's probe were generated and journaled; the replica lives."""

    replica_id: ReplicaId
    unit_id: UnitId
    at_s: float
    #: Of the probe that is answered: a repeated answer must not pass for that of the next probe. None: the present one.
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """The job must stop (a signal, say): what is in flight is journaled, nothing new is begun."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent at :attr:`WorkQueue.wake_at_s`."""

    at_s: float


Event = (
    ReplicasWanted
    | ReplicaReady
    | ReplicaStartFailed
    | ReplicaDied
    | ReplicaProgressed
    | ReplicaEvicted
    | ReplicaDrained
    | UnitCommitted
    | UnitFailed
    | UnitProbed
    | Drain
    | Tick
)


# Commands: what the driver is to do --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start an actor under this id; answer with ReplicaReady, ReplicaStartFailed or ReplicaDied."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class StopReplica:
    """End this actor; no answer is expected and late ones are ignored.

    ``reason`` says what was wrong with it (no sign of life, say); empty when it is only not needed any more.
    """

    replica_id: ReplicaId
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Have the replica journal what it has in flight; answer with ReplicaDrained or ReplicaDied."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Assign:
    """Have the replica generate the unit; answer with UnitCommitted, UnitFailed or ReplicaDied."""

    replica_id: ReplicaId
    unit: WorkUnit
    attempt: int
    #: Counts up with every Assign and Probe of the run, so that a unit's later holder has the greater one.
    lease: int
    #: Offsets of rows that kill their replica: not to be generated.
    poisoned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Have the replica generate and journal these rows only; answer with UnitProbed, UnitFailed or ReplicaDied."""

    replica_id: ReplicaId
    unit: WorkUnit
    #: Offsets within the unit.
    offsets: range
    attempt: int
    lease: int


Outcome = Literal["done", "given_up", "cannot_start", "replicas_keep_dying", "job_error", "drained"]


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more can be done. Sent exactly once, last."""

    outcome: Outcome
    error: str = ""


Command = StartReplica | StopReplica | DrainReplica | Assign | Probe | Finish


# What can be seen of the queue --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica that was started and is not gone, and how many units it holds."""

    replica_id: ReplicaId
    state: Literal["starting", "ready", "draining"]
    num_units: int


@dataclass(frozen=True, slots=True)
class QueueLook:
    """The queue at one moment."""

    num_units_pending: int = 0
    num_units_leased: int = 0
    num_units_given_up: int = 0
    num_ready: int = 0
    num_starting: int = 0
    replicas: tuple[Standing, ...] = ()
