"""Run events folded into what a report shows: runs, replica lives, throughput over time; in bounded memory.

Times are seconds of *running time*: the runs of an output one after the other, the hours between them left out.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from batchinfer.report.event_values import integer_of as _integer
from batchinfer.report.event_values import number_of as _number
from batchinfer.report.event_values import text_of as _text
from batchinfer.storage.events import Event

__all__ = ["IDLE_CAUSES", "Bucket", "ReplicaLife", "RunHistory", "RunSummary", "Series", "fold"]

#: Points a time series has at most; its buckets double in width when more would be needed.
MAX_BUCKETS = 240
#: Replica lives and failures kept one by one; beyond it they are counted only.
MAX_KEPT = 400
#: What an idle engine waits for (``cluster.idle_clock``), as events name it.
IDLE_CAUSES = ("rows", "next_turns", "publishing", "units")


@dataclass(slots=True)
class Bucket:
    """What happened within one bucket of time; sums, but for the two means' parts."""

    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_dead_letters: int = 0
    num_failures: int = 0
    #: Of the replicas' reports that fell into the bucket: shares of batch slots filled, of KV places used.
    batch_fill_sum: float = 0.0
    kv_use_sum: float = 0.0
    num_reports: int = 0

    def add(self, other: "Bucket") -> None:
        """Make this one the sum of both."""
        for name in Bucket.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Series:
    """Buckets of equal width from time 0 on; wide enough that there are never more than ``MAX_BUCKETS``."""

    def __init__(self) -> None:
        self.width_s = 1.0
        self.buckets: list[Bucket] = []

    def at(self, time_s: float) -> Bucket:
        """The bucket of a moment."""
        index = int(max(0.0, time_s) / self.width_s)
        while index >= MAX_BUCKETS:
            self._widen()
            index = int(max(0.0, time_s) / self.width_s)
        while len(self.buckets) <= index:
            self.buckets.append(Bucket())
        return self.buckets[index]

    def _widen(self) -> None:
        self.width_s *= 2.0
        pairs = [self.buckets[first : first + 2] for first in range(0, len(self.buckets), 2)]
        for pair in pairs:
            for other in pair[1:]:
                pair[0].add(other)
        self.buckets = [pair[0] for pair in pairs]


@dataclass(slots=True)
class ReplicaLife:
    """One replica from its start to its end; None: it never came so far, or the run ended before it."""

    run_id: str
    replica: int
    starting_s: float
    ready_s: float | None = None
    ended_s: float | None = None
    #: died | start_failed | drained | stopped, or "" while nothing is known of its end.
    end: str = ""
    error: str = ""
    node: str = ""
    device: str = ""
    engine: str = ""
    capacity: int = 0
    num_units: int = 0
    num_completion_tokens: int = 0
    #: Seconds its engine had nothing to do, as it last reported, and those with a known cause (``IDLE_CAUSES``).
    idle_s: float = 0.0
    idle_s_by_cause: dict[str, float] = field(default_factory=dict)

    def ready_for_s(self, now_s: float) -> float:
        """Seconds it was ready to generate."""
        return 0.0 if self.ready_s is None else max(0.0, (self.ended_s or now_s) - self.ready_s)

    def held_for_s(self, now_s: float) -> float:
        """Seconds it had its device, loading included."""
        return max(0.0, (self.ended_s or now_s) - self.starting_s)


@dataclass(slots=True)
class RunSummary:
    """One run of the output; ``outcome`` is empty for a run that ended without saying so (a crash)."""

    run_id: str
    host: str
    started_at: str
    started_s: float
    ended_s: float
    outcome: str = ""
    error: str = ""
    num_units: int = 0
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_replicas_died: int = 0
    num_unit_failures: int = 0
    num_completions: int = 0
    #: Completions that are amiss, by kind.
    quality: Counter[str] = field(default_factory=Counter)
    num_shared_sequences: int = 0
    #: Why it began to drain: signal, quality, deadline, gpu_hours; empty where it did not.
    stop_reason: str = ""
    last_event_at: str = ""
    last_event: str = ""

    @property
    def elapsed_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(slots=True)
class RunHistory:
    """All runs of one output, oldest first."""

    runs: list[RunSummary] = field(default_factory=list)
    lives: list[ReplicaLife] = field(default_factory=list)
    series: Series = field(default_factory=Series)
    #: Moments and texts of failed units, the first ``MAX_KEPT``.
    failures: list[tuple[float, int, str]] = field(default_factory=list)
    num_events: int = 0
    num_lives: int = 0
    failures_by_cause: Counter[str] = field(default_factory=Counter)

    @property
    def end_s(self) -> float:
        """Running time of all runs together."""
        return self.runs[-1].ended_s if self.runs else 0.0

    @property
    def device_s(self) -> float:
        """Seconds that replicas held a device, of the lives that were kept."""
        return sum(life.held_for_s(self._end_of(life)) for life in self.lives)

    def _end_of(self, life: ReplicaLife) -> float:
        return next((run.ended_s for run in self.runs if run.run_id == life.run_id), self.end_s)

    def seconds(self, life: ReplicaLife) -> tuple[float, float, float]:
        """A life as (loading, generating, idle) seconds."""
        end_s = self._end_of(life)
        ready_s = life.ready_for_s(end_s)
        idle_s = min(life.idle_s, ready_s)
        return life.held_for_s(end_s) - ready_s, ready_s - idle_s, idle_s

    def idle_s_by_cause(self) -> dict[str, float]:
        """Idle seconds of all lives by what their engines waited for; "" = nothing tells."""
        totals = dict.fromkeys((*IDLE_CAUSES, ""), 0.0)
        for life in self.lives:
            idle_s = self.seconds(life)[2]
            # A life's last report may be younger than its end was noticed.
            scale = min(1.0, idle_s / known_s) if (known_s := sum(life.idle_s_by_cause.values())) else 0.0
            for cause, cause_s in life.idle_s_by_cause.items():
                totals[cause] += cause_s * scale
            totals[""] += idle_s - known_s * scale
        return totals


def fold(events: Iterable[Event]) -> RunHistory:
    """Read events in the order they were written, run by run."""
    folding = _Folding()
    for event in events:
        folding.take(event)
    return folding.history


class _Folding:
    def __init__(self) -> None:
        self.history = RunHistory()
        self._run: RunSummary | None = None
        self._began_at_s = 0.0
        self._offset_s = 0.0
        self._living: dict[int, ReplicaLife] = {}

    def take(self, event: Event) -> None:
        history = self.history
        history.num_events += 1
        try:
            at_s = datetime.fromisoformat(str(event["at"])).timestamp()
        except (KeyError, ValueError):
            return
        kind = event["event"]
        if kind == "run_started":
            self._begin(event, at_s)
        run = self._run
        if run is None:
            return
        time_s = self._offset_s + max(0.0, at_s - self._began_at_s)
        run.ended_s = max(run.ended_s, time_s)
        run.last_event_at, run.last_event = str(event["at"]), str(kind)
        match kind:
            case "unit_committed":
                self._committed(event, time_s, run)
            case "replica_starting":
                self._starting(event, time_s, run)
            case "replica_ready":
                self._ready(event, time_s)
            case "replica_stats":
                self._reported(event, time_s)
            case "replica_died" | "replica_start_failed" | "replica_drained" | "replica_stopped":
                self._ended(event, time_s, str(kind).removeprefix("replica_"), run)
            case "unit_failed":
                run.num_unit_failures += 1
                self._failed(event, time_s)
            case "run_finished" | "run_stopped":
                run.stop_reason = _text(event, "reason") or run.stop_reason
                run.outcome = _text(event, "outcome") or _text(event, "reason") or str(kind)
                run.error = _text(event, "error")

    def _begin(self, event: Event, at_s: float) -> None:
        self._offset_s = self.history.end_s
        self._began_at_s = at_s
        self._living = {}
        self._run = RunSummary(
            _text(event, "run"), _text(event, "host"), str(event["at"]), self._offset_s, self._offset_s
        )
        self.history.runs.append(self._run)

    def _committed(self, event: Event, time_s: float, run: RunSummary) -> None:
        rows, prompt_tokens = _integer(event, "num_rows"), _integer(event, "num_prompt_tokens")
        tokens = _integer(event, "num_completion_tokens")
        run.num_units += 1
        run.num_completions += _integer(event, "num_completions")
        if isinstance(quality := event.get("quality"), dict):
            run.quality.update({kind: number for kind, number in quality.items() if isinstance(number, int)})
        run.num_rows += rows
        run.num_prompt_tokens += prompt_tokens
        run.num_completion_tokens += tokens
        run.num_shared_sequences += _integer(event, "num_shared_sequences")
        bucket = self.history.series.at(time_s)
        bucket.num_rows += rows
        bucket.num_prompt_tokens += prompt_tokens
        bucket.num_completion_tokens += tokens
        bucket.num_dead_letters += _integer(event, "num_dead_letters")
        if (life := self._living.get(_integer(event, "replica"))) is not None:
            life.num_units += 1
            life.num_completion_tokens += tokens

    def _starting(self, event: Event, time_s: float, run: RunSummary) -> None:
        life = ReplicaLife(run.run_id, _integer(event, "replica"), time_s)
        self._living[life.replica] = life
        self.history.num_lives += 1
        if len(self.history.lives) < MAX_KEPT:
            self.history.lives.append(life)

    def _ready(self, event: Event, time_s: float) -> None:
        if (life := self._living.get(_integer(event, "replica"))) is not None:
            life.ready_s = time_s
            life.node, life.device, life.engine = (_text(event, name) for name in ("node", "device", "engine"))
            life.capacity = _integer(event, "capacity")

    def _reported(self, event: Event, time_s: float) -> None:
        bucket = self.history.series.at(time_s)
        bucket.num_reports += 1
        bucket.batch_fill_sum += _number(event, "batch_fill")
        bucket.kv_use_sum += _number(event, "kv_use")
        if (life := self._living.get(_integer(event, "replica"))) is not None:
            life.idle_s = _number(event, "idle_s")
            life.idle_s_by_cause = {cause: _number(event, f"idle_{cause}_s") for cause in IDLE_CAUSES}

    def _ended(self, event: Event, time_s: float, end: str, run: RunSummary) -> None:
        if (life := self._living.pop(_integer(event, "replica"), None)) is not None:
            life.ended_s, life.end, life.error = time_s, end, _text(event, "error")
        if end in {"died", "start_failed"}:
            run.num_replicas_died += end == "died"
            self._failed(event, time_s)

    def _failed(self, event: Event, time_s: float) -> None:
        error = _text(event, "error")
        self.history.series.at(time_s).num_failures += 1
        self.history.failures_by_cause[error.partition(":")[0]] += 1
        if len(self.history.failures) < MAX_KEPT:
            self.history.failures.append((time_s, _integer(event, "replica"), error))
