"""What an output says of itself: how far it is, who holds it, how its last run went, its first rows."""

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import pyarrow.parquet as pq

from batchinfer.errors import OutputError
from batchinfer.report.run_history import RunHistory, fold
from batchinfer.report.run_now import RunNow, RunWatch
from batchinfer.storage.dead_letters import look_at_dead_letters
from batchinfer.storage.events import read_events
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.layout import (
    COMPLETIONS,
    ERRORS,
    committed_units,
    completions_part,
    parse_unit_id,
    parts,
    read_job,
    read_plan,
)
from batchinfer.storage.lease import Process, read_lease
from batchinfer.storage.location import Location

State = Literal["running", "complete", "dead_letters", "unfinished"]


@dataclass(frozen=True, slots=True)
class LastRun:
    """The newest run of an output, from its events."""

    run_id: str
    started_at: str
    last_event_at: str
    last_event: str
    num_units_committed: int
    num_completion_tokens: int
    num_replicas_died: int
    num_unit_failures: int
    num_completions: int = 0
    #: Of its completions, those that are amiss by kind.
    quality: dict[str, int] = field(default_factory=dict)
    #: Why it began to drain: signal, quality, deadline, gpu_hours; empty where it did not.
    stop_reason: str = ""

    @property
    def completion_tokens_per_s(self) -> float:
        """Over the whole run, loading included."""
        span = datetime.fromisoformat(self.last_event_at) - datetime.fromisoformat(self.started_at)
        return self.num_completion_tokens / max(span.total_seconds(), 1e-9)


@dataclass(frozen=True, slots=True)
class Holder:
    """The run that holds the output now."""

    run_id: str
    host: str
    pid: int
    started_at: str
    heartbeat_at: str


@dataclass(frozen=True, slots=True)
class Status:
    """An output as its files show it at this moment."""

    state: State
    name: str
    output: str
    fingerprint: str
    num_shards: int
    num_unreadable_shards: int
    num_units: int
    num_units_committed: int
    num_rows: int
    num_rows_committed: int
    num_dead_letters: int
    holder: Holder | None
    last_run: LastRun | None
    #: As far as events tell: what is missing up to ``num_dead_letters`` is of unknown cause.
    dead_letters_by_type: dict[str, int] = field(default_factory=dict)
    #: The holder's run as it goes on; None when nobody works on the output.
    run_now: RunNow | None = None

    def as_json(self) -> dict[str, object]:
        """For ``--json``: plain values only."""
        return asdict(self)


def read_status(output_path: str, storage_options: StorageOptions | None = None) -> Status:
    """Status of an output, from any machine that reaches its files; no input and no cluster is needed.

    Raises OutputError when there is no job, StorageUnavailable when the storage does not answer.
    """
    output, watch = locate(output_path, storage_options), RunWatch()
    status = status_of(output, fold(watch.watching(read_events(output))))
    holder, last = status.holder, status.last_run
    # A holder that is still loading has written no event yet; those of the run before say nothing of it.
    is_told_of = holder is not None and last is not None and holder.run_id == last.run_id
    return replace(
        status,
        dead_letters_by_type=watch.dead_letters_by_type(),
        run_now=watch.now(status.num_rows - status.num_rows_committed) if is_told_of else None,
    )


def status_of(output: Location, history: RunHistory) -> Status:
    """As :func:`read_status`, for events that have been read; without what is true of this moment only."""
    holder = _holder(output)
    job, plan = read_job(output), read_plan(output)
    if job is None or plan is None:
        loading = f"run {holder.run_id} on {holder.host} is still loading its first replica" if holder else "check it"
        raise OutputError(f"{output}: no batchinfer job there; {loading}")
    committed = parts(output, COMPLETIONS)
    done = [unit for unit in plan.units if unit.unit_id in committed]
    num_dead_letters = look_at_dead_letters(output, committed, parts(output, ERRORS)).total
    state: State = "complete"
    if holder is not None:
        state = "running"
    elif len(done) < len(plan.units):
        state = "unfinished"
    elif num_dead_letters or plan.unreadable:
        state = "dead_letters"
    return Status(
        state=state,
        name=str(job.get("name", "")),
        output=str(output),
        fingerprint=str(job.get("fingerprint", "")),
        num_shards=len(plan.shards),
        num_unreadable_shards=len(plan.unreadable),
        num_units=len(plan.units),
        num_units_committed=len(done),
        num_rows=plan.num_rows,
        num_rows_committed=sum(unit.num_rows for unit in done),
        num_dead_letters=num_dead_letters,
        holder=holder,
        last_run=_last_run(history),
    )


def read_rows(
    output_path: str, storage_options: StorageOptions | None = None, num_rows: int = 3
) -> list[dict[str, object]]:
    """The first rows of the completions in the plan's order: by shard path, then by row; fewer when there are fewer.

    Raises OutputError when nothing is committed.
    """
    output = locate(output_path, storage_options)
    units = [unit for unit_id in committed_units(output) if (unit := parse_unit_id(unit_id)) is not None]
    if not units:
        raise OutputError(f"{output}: nothing is committed in {COMPLETIONS}/")
    plan = read_plan(output)
    shards = (*plan.shards, *plan.retired) if plan is not None else ()
    places = {shard.shard_id: place for place, shard in enumerate(shards)}
    rows: list[dict[str, object]] = []
    for unit in sorted(units, key=lambda it: (places.get(it.shard_id, len(places)), it.shard_id, it.first_row)):
        with completions_part(output, unit.unit_id).open_random() as file:
            rows += pq.read_table(file).slice(0, num_rows - len(rows)).to_pylist()
        if len(rows) >= num_rows:
            break
    return rows


def _holder(output: Location) -> Holder | None:
    record = read_lease(output)
    if record is None or not record.is_live(datetime.now(UTC), Process.current()):
        return None
    process = record.process
    return Holder(record.run_id, process.host, process.pid, record.started_at, record.heartbeat_at)


def _last_run(history: RunHistory) -> LastRun | None:
    if not history.runs:
        return None
    run = history.runs[-1]
    return LastRun(
        run_id=run.run_id,
        started_at=run.started_at,
        last_event_at=run.last_event_at,
        last_event=run.last_event,
        num_units_committed=run.num_units,
        num_completion_tokens=run.num_completion_tokens,
        num_replicas_died=run.num_replicas_died,
        num_unit_failures=run.num_unit_failures,
        num_completions=run.num_completions,
        quality=dict(run.quality),
        stop_reason=run.stop_reason,
    )
