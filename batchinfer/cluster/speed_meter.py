"""How fast a run was, from its events: tokens over the time its replicas had something to do. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from batchinfer.speeds import Speed
from batchinfer.storage.events import Event, EventValue

#: The events that it reads.
SPEED_EVENTS = (
    "run_started",
    "run_finished",
    "replica_ready",
    "replica_stats",
    "replica_died",
    "replica_stopped",
    "replica_drained",
    "unit_committed",
)
#: Less than this tells of the start, not of the speed.
MIN_COMPLETION_TOKENS = 256
MIN_REPLICA_S = 5.0


@dataclass(slots=True)
class _Life:
    ready_s: float
    idle_s: float = 0.0


class SpeedMeter:
    """Fed with the events of one run in their order; knows nothing of a run whose replicas are not all alike."""

    def __init__(self) -> None:
        self._living: dict[int, _Life] = {}
        self._busy_s = 0.0
        self._kinds: set[tuple[str, str]] = set()
        self._num_prompt_tokens = 0
        self._num_completion_tokens = 0
        self._num_generated_tokens = 0.0
        self._num_completions = 0
        self._num_units = 0
        self._ended_s: float | None = None
        self.num_replicas = 0

    def take(self, kind: str, at: datetime, facts: Mapping[str, EventValue]) -> None:
        """One event."""
        at_s = at.timestamp()
        replica = int(_number(facts.get("replica", -1)))
        match kind:
            case "replica_ready":
                self._living[replica] = _Life(at_s)
                self.num_replicas += 1
                device = str(facts.get("device_name") or facts.get("device", ""))
                self._kinds.add((str(facts.get("engine", "")), device))
            case "replica_stats" if replica in self._living:
                self._living[replica].idle_s = _number(facts.get("idle_s"))
            case "replica_died" | "replica_stopped" | "replica_drained" if replica in self._living:
                self._end(self._living.pop(replica), at_s)
            case "unit_committed":
                self._committed(facts)
            # Of a run that was stopped, what it had in flight is not counted: it must be little beside the rest.
            case "run_finished" if facts.get("outcome") != "drained" or self._num_units >= 10 * self.num_replicas:
                self._ended_s = at_s

    def speed(self, *, model: str, dtype: str, job: str) -> Speed | None:
        """What a run that ended came to; None where it was too short, drained, mixed, or on the fake engine."""
        if self._ended_s is None or len(self._kinds) != 1:
            return None
        busy_s = self._busy_s + sum(
            max(0.0, self._ended_s - life.ready_s - life.idle_s) for life in self._living.values()
        )
        engine, device = next(iter(self._kinds))
        num_generated = round(self._num_generated_tokens)
        if engine == "fake" or num_generated < MIN_COMPLETION_TOKENS or busy_s < MIN_REPLICA_S:
            return None
        return Speed(
            model=model,
            device=device,
            engine=engine,
            dtype=dtype,
            source="run",
            at=datetime.fromtimestamp(self._ended_s).astimezone().isoformat(timespec="seconds"),
            job=job,
            replica_s=round(busy_s, 3),
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=num_generated,
            num_completions=self._num_completions,
            mean_completion_tokens=self._num_completion_tokens / max(1, self._num_completions),
        )

    def _end(self, life: _Life, at_s: float) -> None:
        self._busy_s += max(0.0, at_s - life.ready_s - life.idle_s)

    def _committed(self, facts: Mapping[str, EventValue]) -> None:
        if facts.get("already_committed"):
            return
        self._num_units += 1
        num_completions = int(_number(facts.get("num_completions")))
        num_tokens = int(_number(facts.get("num_completion_tokens")))
        # Equal requests are generated once; how long those were is not told, so they count as the mean.
        shared = _number(facts.get("num_shared_sequences")) / max(1, num_completions)
        self._num_prompt_tokens += int(_number(facts.get("num_prompt_tokens")))
        self._num_completions += num_completions
        self._num_completion_tokens += num_tokens
        self._num_generated_tokens += max(
            0.0, (num_tokens - _number(facts.get("num_resumed_tokens"))) * (1.0 - min(1.0, shared))
        )


def last_speed(events: Iterable[Event], *, model: str, dtype: str, job: str) -> tuple[Speed, int] | None:
    """Speed and number of replicas of the newest run of an output that tells of it."""
    found: tuple[Speed, int] | None = None
    meter = SpeedMeter()
    for event in events:
        kind = str(event["event"])
        if kind == "run_started":
            meter = SpeedMeter()
        try:
            at = datetime.fromisoformat(str(event.get("at")))
        except ValueError:
            continue
        meter.take(kind, at, event)
        if kind == "run_finished" and (speed := meter.speed(model=model, dtype=dtype, job=job)) is not None:
            found = speed, meter.num_replicas
    return found


def _number(value: EventValue) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
