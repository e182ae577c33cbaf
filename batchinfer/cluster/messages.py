"""What travels between driver and replica: unit descriptors, counts and causes of failure; never rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from batchinfer.cluster.idle_clock import IdleCause
from batchinfer.engine.engine import EngineStats
from batchinfer.records import Shard, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.faults import FaultPlan
from batchinfer.tracing import TraceSetup


@dataclass(frozen=True, slots=True)
class RetryScope:
    """That a replica generates dead letters of committed units, and which of them."""

    #: Only those of these types; empty = all.
    error_types: tuple[str, ...]
    #: Tells the retry's journals from those of the run that committed the units.
    journal_fingerprint: str


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """All a replica needs to know of its job."""

    spec: JobSpec
    #: The hub commit that the driver saw, so that all replicas load the same one; None off the hub.
    model_revision: str | None
    fingerprint: str
    run_id: str
    #: Input columns to read, with their types; those of ``output_columns`` are passed through.
    schema: pa.Schema
    output_columns: tuple[str, ...]
    num_gpus: float
    num_cpus: float
    #: Where the fake engine's faults begin; another one for each replica, or all would fail at the same step.
    fault_seed: str
    #: Its name towards ``chaos``: ``replica-<id>``.
    role: str = "replica-0"
    #: Breaks storage calls on purpose; None = they are left alone.
    chaos: FaultPlan | None = None
    #: None = units are generated whole and committed.
    retry: RetryScope | None = None
    #: None = nothing is traced.
    tracing: TraceSetup | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One unit to work on, with where its rows lie."""

    unit: WorkUnit
    shard: Shard
    attempt: int
    #: Counts up with every assignment of the run; orders the journals of a unit's holders.
    lease: int = 0
    #: Offsets of rows that are known to kill their replica: they become dead letters unseen by the engine.
    poisoned: tuple[int, ...] = ()
    #: Offsets of the rows to try, for a probe.
    offsets: range = range(0)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The rows of a probe were generated and journaled; nothing was committed."""

    unit_id: str
    offsets: range


@dataclass(frozen=True, slots=True)
class Drained:
    """A replica has journaled what it had in flight and generates nothing any more."""

    num_rows_journaled: int
    num_tokens_journaled: int


@dataclass(frozen=True, slots=True)
class ReplicaStarted:
    """The model is loaded; ``capacity`` sequences fit the engine at once."""

    capacity: int
    engine: str
    device: str
    node: str
    start_s: float
    #: Ray's id of the machine, by which its going is announced.
    node_id: str = ""
    #: What the device is called, for comparing speeds; ``device`` says only of which kind it is.
    device_name: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """Counters of one replica since its start."""

    stats: EngineStats
    #: Grows with every step of the engine and every row prepared or published.
    num_signs_of_life: int = 0
    #: How long the engine's thread had nothing to do, and with it the device, by what it waited for.
    idle_s_by_cause: Mapping[IdleCause, float] = field(default_factory=dict)
    #: Storage calls that were tried again, and the journals' flushes with the seconds they took.
    num_storage_retries: int = 0
    num_journal_flushes: int = 0
    journal_s: float = 0.0

    @property
    def idle_s(self) -> float:
        return sum(self.idle_s_by_cause.values())


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call could not do its work; a value, since exceptions of ours would arrive wrapped in Ray's.

    ``job``: no replica anywhere can do better. ``replica``: this replica is unusable. ``unit``: this try failed.
    ``drained``: the replica was told to stop before it was through; what it had is journaled.
    """

    scope: Literal["job", "replica", "unit", "drained"]
    error_type: str
    error: str

    def __str__(self) -> str:
        return f"{self.error_type}: {self.error}"
