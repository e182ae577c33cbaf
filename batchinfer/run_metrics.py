"""What a run exports as metrics: their names, and how one look at the run becomes their values. Pure.

Ray puts ``ray_`` before each name on its way to Prometheus. The tag is ``job_name`` because Prometheus gives
``job`` a meaning of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from batchinfer.telemetry import ReplicaLook, RunProgress

RUN_TAGS: Final = ("job_name", "run_id")
REPLICA_TAGS: Final = (*RUN_TAGS, "replica", "node")
#: Upper ends of the histogram's buckets: from units of a second to units of a night.
UNIT_SECONDS: Final = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 10800.0, 36000.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; a ``counter`` only grows."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = RUN_TAGS


@dataclass(frozen=True, slots=True)
class Sample:
    """A gauge's value, what a counter grows by (more than 0), or one observation of a histogram."""

    metric: Metric
    value: float
    tags: dict[str, str]


ROWS: Final = Metric(
    "batchinfer_rows",
    "gauge",
    "Rows of the output by state: committed, finished (generated, their unit not committed yet), pending",
    (*RUN_TAGS, "state"),
)
ROWS_COMMITTED: Final = Metric("batchinfer_rows_committed_total", "counter", "Rows that this run has committed")
UNITS: Final = Metric(
    "batchinfer_units",
    "gauge",
    "Work units by state: committed (by earlier runs too), in_flight, pending, given_up",
    (*RUN_TAGS, "state"),
)
UNIT_TIME: Final = Metric(
    "batchinfer_unit_seconds", "histogram", "Seconds from the reading of a unit's rows to its commit"
)
DEAD_LETTERS: Final = Metric(
    "batchinfer_dead_letters_total", "counter", "Dead letters of this run's commits", (*RUN_TAGS, "error_type")
)
COMPLETIONS: Final = Metric("batchinfer_completions_total", "counter", "Completions of this run's commits")
POOR_COMPLETIONS: Final = Metric(
    "batchinfer_poor_completions_total",
    "counter",
    "Of those, completions with something amiss: empty, truncated, repeating, wrong_script",
    (*RUN_TAGS, "kind"),
)
ETA: Final = Metric("batchinfer_eta_seconds", "gauge", "Seconds until the last row, if the pace stays")
REPLICAS: Final = Metric(
    "batchinfer_replicas", "gauge", "Replicas by state: starting, running, draining", (*RUN_TAGS, "state")
)
REPLICA_DEATHS: Final = Metric("batchinfer_replica_deaths_total", "counter", "Replicas that died")
PROMPT_TOKENS: Final = Metric("batchinfer_prompt_tokens_total", "counter", "Prompt tokens read", REPLICA_TAGS)
COMPLETION_TOKENS: Final = Metric(
    "batchinfer_completion_tokens_total", "counter", "Completion tokens generated", REPLICA_TAGS
)
BATCH_FILL: Final = Metric(
    "batchinfer_batch_fill_ratio", "gauge", "Sequences in the batch, of the most that fit", REPLICA_TAGS
)
KV_USE: Final = Metric("batchinfer_kv_use_ratio", "gauge", "KV cache in use", REPLICA_TAGS)
IDLE: Final = Metric(
    "batchinfer_replica_idle_seconds_total", "counter", "Seconds the engine had nothing to do", REPLICA_TAGS
)
UNITS_IN_HAND: Final = Metric("batchinfer_replica_units", "gauge", "Units the replica holds", REPLICA_TAGS)
PREEMPTIONS: Final = Metric(
    "batchinfer_preemptions_total", "counter", "Sequences put back for want of KV cache", REPLICA_TAGS
)
STORAGE_RETRIES: Final = Metric(
    "batchinfer_storage_retries_total", "counter", "Storage calls that were tried again", REPLICA_TAGS
)
JOURNAL_FLUSHES: Final = Metric(
    "batchinfer_journal_flushes_total", "counter", "Journals written while their unit is generated", REPLICA_TAGS
)
JOURNAL_TIME: Final = Metric(
    "batchinfer_journal_seconds_total", "counter", "Seconds that took, on threads of its own", REPLICA_TAGS
)

METRICS: Final = (
    ROWS,
    ROWS_COMMITTED,
    UNITS,
    UNIT_TIME,
    DEAD_LETTERS,
    COMPLETIONS,
    POOR_COMPLETIONS,
    ETA,
    REPLICAS,
    REPLICA_DEATHS,
    PROMPT_TOKENS,
    COMPLETION_TOKENS,
    BATCH_FILL,
    KV_USE,
    IDLE,
    UNITS_IN_HAND,
    PREEMPTIONS,
    STORAGE_RETRIES,
    JOURNAL_FLUSHES,
    JOURNAL_TIME,
)


class RunMetrics:
    """Turns looks at one run into samples; remembers how far its counters have come."""

    def __init__(self, job_name: str, run_id: str, num_rows_before: int) -> None:
        """``num_rows_before``: rows that earlier runs committed, which are not this run's."""
        self._tags = {"job_name": job_name, "run_id": run_id}
        self._num_rows_before = num_rows_before
        self._counted: dict[tuple[Metric, str], float] = {}

    def samples(self, progress: RunProgress) -> Iterator[Sample]:
        """Everything to record for this look. A gauge that is not recorded again disappears."""
        yield from self._of_run(progress)
        for look in progress.replicas:
            if look.state in ("running", "draining"):
                yield from self._now_of(look)
                yield from self._totals_of(look)
        for look in progress.replicas_gone:
            yield from self._totals_of(look)

    def _of_run(self, progress: RunProgress) -> Iterator[Sample]:
        committed, finished = progress.num_rows_committed, progress.num_rows_finished
        rows = {"committed": committed, "finished": finished, "pending": progress.num_rows - committed - finished}
        units = {
            "committed": progress.num_units_committed,
            "in_flight": progress.num_units_in_flight,
            "pending": progress.num_units_pending,
            "given_up": progress.num_units_given_up,
        }
        replicas = dict.fromkeys(("starting", "running", "draining"), 0)
        for look in progress.replicas:
            if look.state in replicas:
                replicas[look.state] += 1
        for metric, numbers in ((ROWS, rows), (UNITS, units), (REPLICAS, replicas)):
            for state, number in numbers.items():
                yield Sample(metric, number, {**self._tags, "state": state})
        if progress.eta_s is not None:
            yield Sample(ETA, progress.eta_s, self._tags)
        yield from self._grown(ROWS_COMMITTED, "", committed - self._num_rows_before, self._tags)
        yield from self._grown(REPLICA_DEATHS, "", progress.num_replicas_died, self._tags)
        for error_type, number in progress.dead_letters_by_type.items():
            yield from self._grown(DEAD_LETTERS, error_type, number, {**self._tags, "error_type": error_type})
        yield from self._grown(COMPLETIONS, "", progress.num_completions, self._tags)
        for kind, number in progress.quality.items():
            yield from self._grown(POOR_COMPLETIONS, kind, number, {**self._tags, "kind": kind})
        for seconds in progress.unit_seconds:
            yield Sample(UNIT_TIME, seconds, self._tags)

    def _tags_of(self, look: ReplicaLook) -> dict[str, str]:
        return {**self._tags, "replica": str(look.replica_id), "node": look.node}

    def _now_of(self, look: ReplicaLook) -> Iterator[Sample]:
        tags = self._tags_of(look)
        yield Sample(UNITS_IN_HAND, look.num_units, tags)
        if look.batch_fill is not None:
            yield Sample(BATCH_FILL, look.batch_fill, tags)
        if look.kv_use is not None:
            yield Sample(KV_USE, look.kv_use, tags)

    def _totals_of(self, look: ReplicaLook) -> Iterator[Sample]:
        totals: tuple[tuple[Metric, float], ...] = (
            (PROMPT_TOKENS, look.num_prompt_tokens),
            (COMPLETION_TOKENS, look.num_completion_tokens),
            (IDLE, look.idle_s),
            (PREEMPTIONS, look.num_preemptions),
            (STORAGE_RETRIES, look.num_storage_retries),
            (JOURNAL_FLUSHES, look.num_journal_flushes),
            (JOURNAL_TIME, look.journal_s),
        )
        for metric, total in totals:
            yield from self._grown(metric, str(look.replica_id), total, self._tags_of(look))

    def _grown(self, metric: Metric, of: str, total: float, tags: dict[str, str]) -> Iterator[Sample]:
        key = (metric, of)
        by = total - self._counted.get(key, 0.0)
        if by > 0:
            self._counted[key] = total
            yield Sample(metric, by, tags)
