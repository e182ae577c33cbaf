"""The loop of a run: answers of replicas become events, commands of the work queue become calls.

It decides nothing about units and replicas (``work_queue`` does) and sees no row (``replica`` does).
"""

import logging
import time
from collections import Counter

from batchinfer.cluster.head_watch import HeadWatch
from batchinfer.cluster.interruption import Interruption
from batchinfer.cluster.lease_keeper import LeaseKeeper
from batchinfer.cluster.messages import (
    Assignment,
    Drained,
    Failure,
    ProbeResult,
    ReplicaProgress,
    ReplicaSetup,
    ReplicaStarted,
)
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.queue_messages import (
    Assign,
    Command,
    Drain,
    DrainReplica,
    Event,
    Finish,
    Probe,
    ReplicaDied,
    ReplicaDrained,
    ReplicaEvicted,
    ReplicaProgressed,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicasWanted,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitFailed,
    UnitProbed,
)
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.ray_cluster import cluster_nodes, nodes_about_to_go
from batchinfer.cluster.replica import MAX_UNITS_HELD
from batchinfer.cluster.replica_pool import Answer, ReplicaGone, ReplicaPool
from batchinfer.cluster.replica_spans import ReplicaSpans
from batchinfer.cluster.replica_watch import ReplicaWatch
from batchinfer.cluster.result import GivenUpUnit, JobResult, job_result
from batchinfer.cluster.run_limits import RunLimits, Stop
from batchinfer.cluster.run_record import RunRecord
from batchinfer.cluster.share import ReplicaShare, replica_share
from batchinfer.cluster.work_queue import WorkQueue
from batchinfer.errors import BatchinferError, ClusterLost, ModelError, RunInterrupted, SpecError
from batchinfer.progress import ProgressView
from batchinfer.records import Shard, UnitResult, WorkUnit
from batchinfer.storage.faults import FaultPlan

logger = logging.getLogger(__name__)

#: How often progress is drawn, and how often the cluster's machines are looked at.
SHOW_INTERVAL_S = 1.0
CLUSTER_INTERVAL_S = 2.0
#: Longest wait for an answer before signals, backoffs and the lease are looked at again.
MAX_WAIT_S = 0.25
#: How long a drain may take; the rest of the ten seconds is for leaving Ray and the lease.
DRAIN_TIMEOUT_S = 7.0


class RunLoop:
    """One pass of the loop, from the first replica's start to the last commit."""

    def __init__(
        self,
        preparation: Preparation,
        lease: LeaseKeeper,
        record: RunRecord,
        head: HeadWatch,
        view: ProgressView,
        interruption: Interruption,
        chaos: FaultPlan | None,
        started_s: float,
        limits: RunLimits,
        spans: ReplicaSpans,
    ) -> None:
        execution = preparation.spec.execution
        self._preparation = preparation
        self._lease = lease
        self._record = record
        self._head = head
        self._view = view
        self._interruption = interruption
        self._chaos = chaos
        self._started_s = started_s
        self._limits = limits
        self._spans = spans
        #: What ends the run early, other than a signal.
        self._stop: Stop | None = None
        self._first_ready_s: float | None = None
        self._queue = WorkQueue(
            preparation.pending,
            QueuePolicy(
                max_attempts=execution.max_attempts,
                max_start_attempts=execution.max_start_attempts,
                units_in_flight=execution.units_in_flight,
                max_units_held=MAX_UNITS_HELD,
                samples_per_row=preparation.spec.sampling.n,
                hang_timeout_s=execution.hang_timeout_s,
                start_timeout_s=execution.start_timeout_s,
                drain_timeout_s=DRAIN_TIMEOUT_S,
            ),
        )
        self._shards = {shard.shard_id: shard for shard in preparation.plan.shards}
        self._share = ReplicaShare(0.0, 1.0, 0, 0)
        self._pool = ReplicaPool()
        self._watch = ReplicaWatch()
        self._start_errors: Counter[str] = Counter()
        self._tally = preparation.tally()
        self._journaled = Drained(0, 0)
        self._is_draining = False
        self._finish: Finish | None = None

    def to_the_end(self) -> JobResult:
        """Drive until the queue says that nothing more can be done."""
        try:
            self._look_at_cluster(time.monotonic())
            look_at_s = show_at_s = time.monotonic() + CLUSTER_INTERVAL_S
            while self._finish is None:
                answers = self._pool.answers(MAX_WAIT_S)
                # Between the answers and what follows from them: this process may have been stopped for an hour.
                self._lease.check()
                self._head.check()
                for answer in answers:
                    # An answer of the same list may have told that its replica is gone, and with it this one is void.
                    if answer.replica_id in self._pool:
                        self._take_answer(answer, time.monotonic())
                    # Before the next commit is followed by the next unit.
                    self._drain_if_asked(time.monotonic())
                now_s = time.monotonic()
                self._drain_if_asked(now_s)
                wake_at_s = self._queue.wake_at_s
                if wake_at_s is not None and wake_at_s <= now_s:
                    self._handle(Tick(now_s))
                for replica_id in self._watch.due(now_s):
                    self._pool.ask_progress(replica_id)
                if now_s >= look_at_s:
                    look_at_s = now_s + CLUSTER_INTERVAL_S
                    self._look_at_cluster(now_s)
                if now_s >= show_at_s:
                    show_at_s = now_s + SHOW_INTERVAL_S
                    self._show(now_s)
                self._record.flush()
            # What the last answers brought; metrics would never hear of it.
            self._show(time.monotonic())
        finally:
            # First of all: a run that lost its lease must not have its replicas go on.
            self._pool.stop_all()
        return self._result()

    def _drain_if_asked(self, now_s: float) -> None:
        """By a signal, or by what the job allows itself."""
        if self._is_draining or self._finish is not None:
            return
        if self._interruption.is_asked:
            self._begin_drain(now_s)
        elif (stop := self._limits.reached()) is not None:
            self._begin_drain(now_s, stop)

    def _begin_drain(self, now_s: float, stop: Stop | None = None) -> None:
        # Now: without replicas there is no rate to tell the rest by.
        self._show(now_s)
        self._is_draining, self._stop = True, stop
        self._record.event("run_stopped", reason=stop or "signal")
        why = f" ({stop})" if stop is not None else ""
        logger.info("stopping%s: replicas journal what they have in flight; a second signal ends it at once", why)
        self._handle(Drain(now_s))

    def _look_at_cluster(self, now_s: float) -> None:
        """The cluster may have grown or shrunk since, and machines may have been given notice."""
        if self._is_draining:
            return
        if self._preparation.pending:
            before, self._share = self._share, replica_share(self._preparation.spec.cluster, cluster_nodes())
            if not self._share.num_fitting and self._share != before:
                self._cannot_place()
        # Before the evictions: room that is about to go must not be filled again.
        self._handle(ReplicasWanted(self._share.num_replicas, now_s))
        for replica_id in self._watch.evict(nodes_about_to_go() if self._preparation.pending else frozenset()):
            logger.info("replica %d: its machine is about to go; it is drained", replica_id)
            self._handle(ReplicaEvicted(replica_id, now_s))

    def _cannot_place(self) -> None:
        """No node can hold a replica: hopeless on this machine alone, worth waiting for on a cluster, which may grow.

        Raises SpecError for a Ray inside this process.
        """
        asked = f"a replica takes {self._share.num_gpus:g} GPUs and {self._share.num_cpus:g} CPUs"
        if self._preparation.spec.cluster.address is None:
            raise SpecError(
                f"cluster: {asked}, which this machine does not have; lower cluster.num_gpus or cluster.num_cpus, or "
                "join a cluster with cluster.address"
            )
        logger.warning("%s, which no node of the cluster has; waiting for one that does", asked)

    def _take_answer(self, answer: Answer, now_s: float) -> None:
        replica_id, assignment = answer.replica_id, answer.assignment
        match answer.value:
            case ReplicaStarted() as started:
                self._replica_ready(replica_id, started, now_s)
            case UnitResult() as result if assignment is not None:
                self._tally.unit_committed(replica_id, result)
                self._record.unit_committed(replica_id, result)
                self._limits.unit_committed(result)
                self._handle(UnitCommitted(replica_id, result.unit_id, now_s))
            case ProbeResult() as result if assignment is not None:
                self._record.event(
                    "unit_probed",
                    replica=replica_id,
                    unit=result.unit_id,
                    first=result.offsets.start,
                    num_rows=len(result.offsets),
                )
                self._handle(UnitProbed(replica_id, result.unit_id, now_s, assignment.lease))
            case ReplicaProgress() as progress:
                self._replica_progressed(replica_id, progress, now_s)
            case Drained() as drained:
                self._replica_drained(replica_id, drained, now_s)
            case Failure(scope="drained"):
                # Its replica's own answer to the drain says the same for all of its units.
                pass
            case Failure(scope="unit") as failure if assignment is not None:
                unit_id = assignment.unit.unit_id
                self._record.event("unit_failed", replica=replica_id, unit=unit_id, error=str(failure))
                logger.warning("unit %s failed on replica %d: %s", unit_id, replica_id, failure)
                self._handle(UnitFailed(replica_id, unit_id, str(failure), now_s))
            case Failure() as failure if answer.method == "start":
                self._start_failed(replica_id, str(failure), now_s, final=failure.scope == "job")
            case ReplicaGone(node_died=False) as gone if answer.method == "start":
                self._start_failed(replica_id, gone.error, now_s, final=False)
            case ReplicaGone() as gone:
                blameless = gone.node_died or self._watch.is_evicted(replica_id)
                self._replica_died(replica_id, gone.error, now_s, blameless=blameless)
            case Failure() as failure:
                self._replica_died(replica_id, str(failure), now_s, blameless=False)
            case _:
                raise TypeError(f"replica {replica_id} answered {type(answer.value).__name__} to {answer.method}")

    def _replica_ready(self, replica_id: int, started: ReplicaStarted, now_s: float) -> None:
        if self._first_ready_s is None:
            self._first_ready_s = now_s
            # Only now: a job whose model cannot be loaded leaves nothing behind.
            self._record.begin()
        self._record.replica_ready(replica_id, started)
        logger.info(
            "replica %d is ready on %s (%s engine, %s, %d sequences at once) after %.1f s",
            replica_id,
            started.node,
            started.engine,
            started.device,
            started.capacity,
            started.start_s,
        )
        self._watch.ready(replica_id, started.node_id, now_s)
        self._limits.replica_ready(replica_id, started.start_s)
        self._tally.replica_ready(replica_id, started, now_s)
        self._handle(ReplicaReady(replica_id, started.capacity, now_s))

    def _replica_progressed(self, replica_id: int, progress: ReplicaProgress, now_s: float) -> None:
        self._tally.replica_reported(replica_id, progress, now_s)
        if self._watch.answered(replica_id, now_s):
            self._record_stats(replica_id)
        self._handle(ReplicaProgressed(replica_id, progress.num_signs_of_life, now_s))

    def _record_stats(self, replica_id: int) -> None:
        if (counters := self._tally.replica_stats(replica_id)) is not None:
            self._record.event("replica_stats", replica=replica_id, **counters)

    def _replica_drained(self, replica_id: int, drained: Drained, now_s: float) -> None:
        self._record_stats(replica_id)
        self._record.event(
            "replica_drained",
            replica=replica_id,
            num_rows_journaled=drained.num_rows_journaled,
            num_tokens_journaled=drained.num_tokens_journaled,
        )
        if self._is_draining:
            self._journaled = Drained(
                self._journaled.num_rows_journaled + drained.num_rows_journaled,
                self._journaled.num_tokens_journaled + drained.num_tokens_journaled,
            )
        self._end_replica(replica_id, now_s)
        self._handle(ReplicaDrained(replica_id, now_s))

    def _start_failed(self, replica_id: int, error: str, now_s: float, *, final: bool) -> None:
        self._record.event("replica_start_failed", replica=replica_id, error=error)
        self._start_errors[error] += 1
        # Once for each reason: on a hundred GPUs the log would be full of it. How often is told at the end.
        if self._start_errors[error] == 1:
            logger.warning("replica %d cannot start: %s", replica_id, error)
        self._spans.end(replica_id, error)
        self._end_replica(replica_id, now_s)
        self._handle(ReplicaStartFailed(replica_id, error, final, now_s))

    def _replica_died(self, replica_id: int, error: str, now_s: float, *, blameless: bool) -> None:
        self._record_stats(replica_id)
        self._record.event("replica_died", replica=replica_id, error=error, blameless=blameless)
        logger.warning("replica %d died: %s", replica_id, error)
        # It may be alive but unusable (a broken CUDA context, say); its device is needed for the next one.
        self._end_replica(replica_id, now_s, died_of=error)
        self._handle(ReplicaDied(replica_id, error, now_s, blameless))

    def _end_replica(self, replica_id: int, now_s: float, died_of: str = "") -> None:
        self._pool.stop(replica_id)
        self._watch.gone(replica_id)
        self._limits.replica_gone(replica_id)
        self._tally.replica_gone(replica_id, now_s, died_of)
        self._spans.end(replica_id, died_of)

    def _handle(self, event: Event) -> None:
        for command in self._queue.handle(event):
            self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case StartReplica(replica_id=replica_id):
                self._pool.start(replica_id, self._setup(replica_id))
                self._record.event("replica_starting", replica=replica_id, num_gpus=self._share.num_gpus)
                self._limits.replica_starting(replica_id, self._share.num_gpus)
            case StopReplica(replica_id=replica_id, reason=reason):
                if replica_id not in self._pool:
                    return
                self._record_stats(replica_id)
                self._record.event("replica_stopped", replica=replica_id, error=reason)
                if reason:
                    logger.warning("replica %d is ended: %s", replica_id, reason)
                self._end_replica(replica_id, time.monotonic(), died_of=reason)
            case DrainReplica(replica_id=replica_id):
                self._pool.drain(replica_id)
            case Assign() as it:
                assignment = Assignment(it.unit, self._shard_of(it.unit), it.attempt, it.lease, it.poisoned)
                self._pool.assign(it.replica_id, "generate", assignment)
                self._record.unit_leased(it.replica_id, it.unit.unit_id, it.attempt, len(it.poisoned))
            case Probe() as it:
                shard = self._shard_of(it.unit)
                self._pool.assign(
                    it.replica_id, "probe", Assignment(it.unit, shard, it.attempt, it.lease, offsets=it.offsets)
                )
            case Finish():
                self._finish = command

    def _shard_of(self, unit: WorkUnit) -> Shard:
        return self._shards[unit.shard_id].for_unit(unit)

    def _setup(self, replica_id: int) -> ReplicaSetup:
        preparation = self._preparation
        return ReplicaSetup(
            spec=preparation.spec,
            fingerprint=preparation.fingerprint.digest,
            run_id=self._lease.run_id,
            model_revision=preparation.facts.model.revision,
            schema=preparation.facts.schema,
            output_columns=preparation.facts.output_columns,
            num_gpus=self._share.num_gpus,
            num_cpus=self._share.num_cpus,
            fault_seed=f"{preparation.spec.engine.fake.fault_seed}/{self._lease.run_id}/{replica_id}",
            role=f"replica-{replica_id}",
            chaos=self._chaos,
            retry=preparation.retry.scope if preparation.retry is not None else None,
            tracing=self._spans.begin(replica_id),
        )

    def _show(self, now_s: float) -> None:
        progress = self._tally.progress(now_s, now_s - self._started_s, self._queue.look())
        if not self._is_draining:
            self._limits.note_rate(progress.eta_s)
        self._view.show(progress)

    def _result(self) -> JobResult:
        finish, now_s = self._finish, time.monotonic()
        assert finish is not None
        for replica_id in self._watch.replicas():
            self._record_stats(replica_id)
        self._record.event("run_finished", outcome=finish.outcome, error=finish.error)
        match finish.outcome:
            case "job_error":
                raise ModelError(finish.error)
            case "cannot_start":
                # Those that were ended because they took too long are not among the errors.
                times = f" ({self._start_errors[finish.error]} times)" if self._start_errors[finish.error] > 1 else ""
                raise ClusterLost(f"no replica could be started; the last one said{times}: {finish.error}")
            case "replicas_keep_dying":
                raise ClusterLost(f"replicas keep dying before they commit anything; the last one said: {finish.error}")
            case "drained":
                raise self._stopped()
        # A run that only had a plan to write never saw a replica.
        self._record.begin()
        self._limits.check_quality()
        return job_result(
            self._preparation,
            self._tally,
            run_id=self._lease.run_id,
            elapsed_s=now_s - self._started_s,
            generation_s=now_s - (self._first_ready_s or now_s),
            given_up=[
                GivenUpUnit(it.unit.unit_id, self._shards[it.unit.shard_id].path, it.num_attempts, it.error)
                for it in self._queue.given_up
            ],
        )

    def _stopped(self) -> BatchinferError:
        tally, journaled = self._tally, self._journaled
        num_committed = tally.num_rows_before + tally.num_rows_committed
        text = (
            f"stopped: {num_committed:,} of {tally.num_rows:,} rows are committed, "
            f"{journaled.num_rows_journaled:,} rows and {journaled.num_tokens_journaled:,} tokens of others are "
            "journaled"
        )
        if self._stop is None:
            return RunInterrupted(f"{text}; run the same command again to continue")
        return self._limits.stopped(self._stop, text, tally.num_rows - num_committed, tally.num_rows_committed)
