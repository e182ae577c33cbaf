"""From the work that is left and a speed that was seen to hours and money; every number says what it rests on. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from batchinfer.speeds import Speed

#: What reading a prompt token costs of what generating one does, where nobody has measured them apart: from a GPU
#: with a full batch and long outputs to a small model on a CPU.
PREFILL_COST = (0.02, 0.5)

Lengths = Literal["given choices", "a run of this job", "probe", "max_new_tokens"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is left to compute."""

    num_prompt_tokens: float
    num_completion_tokens: float
    num_completions: float
    #: Where the completions' lengths come from; of ``max_new_tokens``, that they are at most so long.
    lengths: Lengths

    @property
    def is_upper_bound(self) -> bool:
        return self.lengths == "max_new_tokens"


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long, on how many devices, for how much; ranges where more than one number fits what is known."""

    work: Workload
    speed: Speed
    #: Seconds of one replica, were it alone; least and most.
    replica_s: tuple[float, float]
    #: Replicas the job gets here; None where only the cluster knows.
    num_replicas: int | None
    #: GPUs of each; a replica without a GPU counts as one, as in ``execution.max_gpu_hours``.
    gpus_per_replica: float
    price_per_gpu_hour: float | None = None

    @property
    def elapsed_s(self) -> tuple[float, float]:
        """By the clock; of one replica where their number is not known."""
        least, most = self.replica_s
        return least / (self.num_replicas or 1), most / (self.num_replicas or 1)

    @property
    def gpu_hours(self) -> tuple[float, float]:
        least, most = self.replica_s
        return least * self.gpus_per_replica / 3600, most * self.gpus_per_replica / 3600

    @property
    def cost(self) -> tuple[float, float] | None:
        if self.price_per_gpu_hour is None:
            return None
        least, most = self.gpu_hours
        return least * self.price_per_gpu_hour, most * self.price_per_gpu_hour

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        speed = self.speed
        return {
            "num_prompt_tokens": round(self.work.num_prompt_tokens),
            "num_completion_tokens": round(self.work.num_completion_tokens),
            "completion_lengths_from": self.work.lengths,
            "is_upper_bound": self.work.is_upper_bound,
            "num_replicas": self.num_replicas,
            "gpus_per_replica": self.gpus_per_replica,
            "elapsed_s": [round(value, 1) for value in self.elapsed_s],
            "gpu_hours": [round(value, 4) for value in self.gpu_hours],
            "cost": None if self.cost is None else [round(value, 4) for value in self.cost],
            "basis": {
                "source": speed.source,
                "at": speed.at,
                "device": speed.device,
                "engine": speed.engine,
                "dtype": speed.dtype,
                "replica_s": speed.replica_s,
                "num_prompt_tokens": speed.num_prompt_tokens,
                "num_completion_tokens": speed.num_completion_tokens,
                "prefill_tokens_per_s": speed.prefill_tokens_per_s,
                "decode_tokens_per_s": speed.decode_tokens_per_s,
            },
        }


def replica_seconds(work: Workload, speed: Speed, job: str, probe: Speed | None = None) -> tuple[float, float]:
    """Seconds of one replica, least and most.

    A run of the same ``job`` tells by its completions. A speed with prefill and decode apart gives one number. Another
    run is a mixture of both: it fits work of another mixture only as far as their costs are known, from a probe of the
    same model and device, or as :data:`PREFILL_COST` bounds them.
    """
    if speed.source == "run" and speed.job == job and speed.num_completions:
        seconds = speed.replica_s * work.num_completions / speed.num_completions
        return seconds, seconds
    if speed.prefill_tokens_per_s and speed.decode_tokens_per_s:
        seconds = (
            work.num_prompt_tokens / speed.prefill_tokens_per_s + work.num_completion_tokens / speed.decode_tokens_per_s
        )
        return seconds, seconds
    costs: Iterable[float] = PREFILL_COST
    if probe is not None and probe.prefill_tokens_per_s and probe.decode_tokens_per_s:
        costs = (probe.decode_tokens_per_s / probe.prefill_tokens_per_s,)
    found = [
        speed.replica_s
        * (work.num_completion_tokens + cost * work.num_prompt_tokens)
        / max(1.0, speed.num_completion_tokens + cost * speed.num_prompt_tokens)
        for cost in costs
    ]
    return min(found), max(found)


def fitting_speeds(
    speeds: Iterable[Speed], *, model: str, dtype: str, engine: str, devices: Collection[str] | None
) -> tuple[Speed, ...]:
    """Those of this model in this dtype on one of these devices, newest first; None and ``auto`` stand for any."""
    found = [
        speed
        for speed in speeds
        if (speed.model, speed.dtype) == (model, dtype)
        and (devices is None or speed.device in devices)
        and engine in ("auto", speed.engine)
    ]
    return tuple(reversed(found))
