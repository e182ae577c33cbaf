"""What a run writes into ``_job/``: plan and job when its first replica is ready, and events as they happen."""

import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType

from batchinfer import __version__
from batchinfer.cluster.messages import ReplicaStarted
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.retry_prepare import note_retry
from batchinfer.cluster.speed_meter import SpeedMeter
from batchinfer.fingerprint import redacted_spec
from batchinfer.records import UnitResult
from batchinfer.redact import redact
from batchinfer.speeds import Speed, model_key
from batchinfer.storage.events import EventLog, EventValue, open_event_log
from batchinfer.storage.journal import remove_journals_except
from batchinfer.storage.layout import clear_staging, set_aside, write_job, write_plan

logger = logging.getLogger(__name__)

_PACKAGES = ("ray", "torch", "transformers", "pyarrow", "fsspec")

#: What a reader of the output may expect when it generates a row again.
_REPRODUCIBILITY = {
    "sampling": "a function of (seed, row_id, sample, position); not of batch, replica, order or restart",
    "float32": "equal on every batch shape, but for candidates that tie to about 1e-6",
    "bfloat16": "not bitwise equal between batch shapes: rounding may flip near-ties, after which texts diverge",
    "float16": "not bitwise equal between batch shapes: rounding may flip near-ties, after which texts diverge",
}


class RunRecord:
    """Context manager around a run. Until :meth:`begin` events are held back and nothing is written.

    The events, each with ``at`` and ``event`` (readers must bear events and fields they do not know):

    * ``run_started`` run, host, num_units_pending, num_units_committed, scripts (that the quality is judged
      by); ``run_stopped`` reason (a drain begins: signal, quality, deadline, gpu_hours); ``run_finished`` outcome,
      error.
    * ``replica_starting`` num_gpus, ``replica_start_failed`` error, ``replica_ready`` engine, device, device_name,
      node, capacity, start_s; a replica's end is one of ``replica_died`` error, blameless; ``replica_stopped`` error
      (it hung, say; empty: it was not needed any more); ``replica_drained`` num_rows_journaled, num_tokens_journaled;
      or the run's.
    * ``replica_stats``, every half minute and at its end: batch_fill (sequences in the batch now / capacity), kv_use
      (share of the KV cache's places used now), idle_s (since its start, the engine had nothing to do), and the
      engine's counters since its start as ``EngineStats`` names them.
    * ``unit_leased`` unit, attempt, num_poisoned; ``unit_probed`` unit, first, num_rows; ``unit_failed`` unit, error;
      ``unit_committed`` with its counts. All but the first and last kinds say which ``replica``.
    """

    def __init__(self, preparation: Preparation, run_id: str) -> None:
        self._preparation = preparation
        self._run_id = run_id
        self._log: EventLog | None = None
        self._held_back: list[tuple[datetime, str, dict[str, EventValue]]] = []
        self._meter = SpeedMeter()
        self.event(
            "run_started",
            run=run_id,
            host=platform.node(),
            num_units_pending=len(preparation.pending),
            num_units_committed=preparation.num_units_committed,
            scripts=list(preparation.spec.quality.scripts),
        )

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()

    def begin(self) -> None:
        """Write plan and job and open the event log; nothing happens the second time.

        The plan comes first: job.json is what makes the directory an output, and it must not be one without a
        plan. A crash in between leaves a plan that the next run replaces.
        """
        if self._log is not None:
            return
        preparation = self._preparation
        clear_staging(preparation.output)
        if preparation.superseded:
            logger.warning(
                "%d parts of shards that have changed since move to _job/superseded: %s",
                len(preparation.superseded),
                ", ".join(sorted(preparation.superseded)[:5]),
            )
            set_aside(preparation.output, preparation.superseded)
        if preparation.plan_changed:
            write_plan(preparation.output, preparation.plan)
        if preparation.is_new:
            write_job(preparation.output, self._job())
        # What a crash between a commit and the removal of its journal left, or a replica whose driver was gone.
        remove_journals_except(preparation.output, [unit.unit_id for unit in preparation.units_to_resume])
        if preparation.retry is not None:
            note_retry(preparation, self._run_id)
        self._log = open_event_log(preparation.output, self._run_id)
        held_back, self._held_back = self._held_back, []
        for at, kind, facts in held_back:
            self._log.add(kind, at, **facts)

    def event(self, kind: str, **facts: EventValue) -> None:
        """Note one event: counts, ids and errors, never a row's text; a URI in an error loses its credentials.

        It is in the log after the next :meth:`flush`; a crash before it loses the account, never the rows.
        """
        clean = {name: redact(value) if isinstance(value, str) else value for name, value in facts.items()}
        self._meter.take(kind, datetime.now(UTC), clean)
        if self._log is None:
            self._held_back.append((datetime.now(UTC), kind, clean))
        else:
            self._log.add(kind, **clean)

    def flush(self) -> None:
        """Store the events since the last call; the loop calls it once each time round."""
        if self._log is not None:
            self._log.flush()

    def speed(self) -> Speed | None:
        """How fast the run was; None before its end, and where it tells nothing of another run."""
        preparation = self._preparation
        model = preparation.facts.model
        return self._meter.speed(
            model=model_key(model.identity), dtype=preparation.spec.model.dtype, job=preparation.fingerprint.digest
        )

    def replica_ready(self, replica_id: int, started: ReplicaStarted) -> None:
        """A model is loaded."""
        self.event(
            "replica_ready",
            replica=replica_id,
            engine=started.engine,
            device=started.device,
            device_name=started.device_name,
            node=started.node,
            capacity=started.capacity,
            start_s=round(started.start_s, 3),
        )

    def unit_leased(self, replica_id: int, unit_id: str, attempt: int, num_poisoned: int) -> None:
        """A replica was given a unit."""
        self.event("unit_leased", replica=replica_id, unit=unit_id, attempt=attempt, num_poisoned=num_poisoned)

    def unit_committed(self, replica_id: int, result: UnitResult) -> None:
        """The event that status and report count by."""
        self.event(
            "unit_committed",
            replica=replica_id,
            unit=result.unit_id,
            num_rows=result.num_rows,
            num_completions=result.num_completions,
            num_dead_letters=result.num_dead_letters,
            num_prompt_tokens=result.num_prompt_tokens,
            num_completion_tokens=result.num_completion_tokens,
            num_resumed_tokens=result.num_resumed_tokens,
            num_shared_sequences=result.num_shared_sequences,
            dead_letters_by_type=dict(result.dead_letters_by_type),
            elapsed_s=round(result.elapsed_s, 3),
            already_committed=result.already_committed,
            quality=dict(result.quality),
        )

    def _job(self) -> dict[str, object]:
        preparation = self._preparation
        spec = preparation.spec
        return {
            "name": spec.name,
            "fingerprint": preparation.fingerprint.digest,
            "fingerprint_parts": preparation.fingerprint.parts,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "n": spec.sampling.n,
            "sampling_column": spec.prompt.sampling_column,
            "request_column": spec.prompt.request,
            "reproducibility": {
                "sampling": _REPRODUCIBILITY["sampling"],
                spec.model.dtype: _REPRODUCIBILITY[spec.model.dtype],
            },
            "versions": {"batchinfer": __version__, "python": platform.python_version(), **_versions()},
            "spec": redacted_spec(spec),
        }


def _versions() -> dict[str, str]:
    """Versions on the driver's machine, read from package metadata so that nothing heavy is imported."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
