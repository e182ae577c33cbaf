"""What travels between driver and replica: unit descriptors, counts and causes of failure; never rows."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from batchinfer.engine.engine import EngineStats
from batchinfer.records import Shard, WorkUnit
from batchinfer.spec import JobSpec


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


@dataclass(frozen=True, slots=True)
class Assignment:
    """One unit to generate, with where its rows lie."""

    unit: WorkUnit
    shard: Shard
    attempt: int


@dataclass(frozen=True, slots=True)
class ReplicaStarted:
    """The model is loaded; ``capacity`` sequences fit the engine at once."""

    capacity: int
    engine: str
    device: str
    node: str
    start_s: float


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """Counters of one replica since its start."""

    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call could not do its work; a value, since exceptions of ours would arrive wrapped in Ray's.

    ``job``: no replica anywhere can do better. ``replica``: this replica is unusable. ``unit``: this try failed.
    """

    scope: Literal["job", "replica", "unit"]
    error_type: str
    error: str

    def __str__(self) -> str:
        return f"{self.error_type}: {self.error}"
