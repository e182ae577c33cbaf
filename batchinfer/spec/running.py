"""Blocks that say how a job runs and change no row: engine, cluster, execution, quality, telemetry."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from batchinfer.moments import parse_deadline
from batchinfer.quality import QualityKind, Script
from batchinfer.spec.block import Block, NonNegative, Positive, Share


class FakeSpec(Block):
    """The fake engine's speed and faults: no model, no torch, tokens that depend on the prompt alone."""

    #: Simulated speed of one replica; null = as fast as it goes.
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    #: Time before the replica is ready.
    start_s: Annotated[float, Field(ge=0)] = 0.0
    #: Probability per step (seeded) that the engine raises, as a driver error would.
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: Probability per step (seeded) that the replica's process dies on the spot.
    crash_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: A prompt containing this token id kills the replica's process each time it is generated.
    poison_token_id: NonNegative | None = None
    #: Seed of the two rates.
    fault_seed: int = 0


class EngineSpec(Block):
    """Which engine, and its limits. The defaults come from the device."""

    #: auto = continuous where it knows the model and its kernels prove right on the device, else padded.
    kind: Literal["auto", "continuous", "padded", "fake"] = "auto"
    #: Sequences in one batch; null = from the device.
    max_batch_rows: Positive | None = None
    #: Rows times padded length of one batch, the KV cache's size in tokens; null = from the device's memory.
    max_batch_tokens: Positive | None = None
    fake: FakeSpec = Field(default_factory=FakeSpec)


class ClusterSpec(Block):
    """Where replicas run."""

    #: null = a Ray started inside this process; "auto" or "ray://host:port" joins a cluster.
    address: str | None = None
    #: auto = one per GPU of the cluster, one on a CPU-only cluster.
    replicas: Positive | Literal["auto"] = "auto"
    #: Per replica; null = 1 where the cluster has GPUs, else 0.
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    #: Per replica; null = 1 with a GPU, else an equal share of the cores.
    num_cpus: Annotated[float, Field(gt=0)] | None = None


class ExecutionSpec(Block):
    """Units, retries and timing."""

    rows_per_unit: Positive = 1024
    #: Rows and tokens of units in flight are journaled at most this far apart.
    journal_interval_s: Annotated[float, Field(gt=0)] = 30.0
    #: Tries per work unit before it is given up for this run.
    max_attempts: Positive = 3
    #: A replica that cannot start is tried this often before the run ends.
    max_start_attempts: Positive = 3
    #: A replica with units but without a sign of life (a step, a row read or written) for this long is replaced.
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    #: A replica that is not ready after this long is replaced.
    start_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    #: Units each replica holds; at least two, so that the next unit's rows start before the last one's slowest ends.
    units_in_flight: Annotated[int, Field(ge=2)] = 2
    #: A lease without a heartbeat for this long may be taken over.
    lease_timeout_s: Annotated[float, Field(ge=2)] = 60.0
    #: The run drains so that it is over by then: a moment with its zone, a time of day ("06:00") or a duration ("8h").
    deadline: str | None = None
    #: All runs of the output together hold GPUs no longer than this; a replica without a GPU counts as one with one.
    max_gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @field_validator("deadline")
    @classmethod
    def _deadline_can_be_read(cls, deadline: str | None) -> str | None:
        if deadline is not None:
            parse_deadline(deadline)
        return deadline


class QualitySpec(Block):
    """What completions are watched for, and from which share on the run is stopped. Shares are of completions."""

    #: Script, or list of scripts, that most letters of a completion should be of; null = any.
    script: Script | Annotated[list[Script], Field(min_length=1)] | None = None
    #: null = only counted. Empty: nothing but white space.
    max_empty: Share | None = None
    #: Ended by max_new_tokens or the model's length.
    max_truncated: Share | None = None
    #: Ends in a loop.
    max_repeating: Share | None = None
    #: Most of its letters are of other scripts than ``script``.
    max_wrong_script: Share | None = None
    #: Rows that must have been committed before a share means anything; later on the last ten times as many count.
    min_rows: Positive = 100

    @model_validator(mode="after")
    def _script_is_given(self) -> "QualitySpec":
        if self.max_wrong_script is not None and self.script is None:
            raise ValueError("max_wrong_script needs to know which script is right; give script, for example hangul")
        return self

    @property
    def scripts(self) -> tuple[Script, ...]:
        if self.script is None:
            return ()
        return (self.script,) if isinstance(self.script, str) else tuple(self.script)

    @property
    def limits(self) -> dict[QualityKind, float]:
        """The shares that stop a run, by what they are shares of."""
        limits: dict[QualityKind, float | None] = {
            "empty": self.max_empty,
            "truncated": self.max_truncated,
            "repeating": self.max_repeating,
            "wrong_script": self.max_wrong_script,
        }
        return {kind: limit for kind, limit in limits.items() if limit is not None}


class TelemetrySpec(Block):
    """What a run tells of itself beside its output."""

    #: Counters and gauges to Ray, whose agents export them for Prometheus.
    metrics: bool = True
    #: Spans by OpenTelemetry to where the OTEL_* variables say; needs the extra ``otel``.
    traces: bool = False
