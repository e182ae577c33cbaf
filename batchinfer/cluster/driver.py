"""The driver: one loop around ``ray.wait`` that turns answers into events and commands into calls.

It decides nothing about units and replicas (``work_queue`` does) and sees no row (``replica`` does). Whatever
moment this process dies at, the next run continues: parts are published by the replicas, and all that is kept
here can be listed again.
"""

import contextlib
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import ray
import ray.exceptions
from ray import ObjectRef
from ray.actor import ActorHandle

from batchinfer.cluster.head_watch import HeadWatch
from batchinfer.cluster.lease_keeper import LeaseKeeper
from batchinfer.cluster.messages import Assignment, Failure, ReplicaProgress, ReplicaSetup, ReplicaStarted
from batchinfer.cluster.prepare import Preparation, compare_with_output, prepare
from batchinfer.cluster.ray_cluster import cluster_nodes, connected, head_address
from batchinfer.cluster.replica import MAX_UNITS_HELD, Replica, start_actor
from batchinfer.cluster.result import GivenUpUnit, JobResult, job_result
from batchinfer.cluster.run_record import RunRecord
from batchinfer.cluster.share import ReplicaShare, replica_share
from batchinfer.cluster.work_queue import (
    Assign,
    Command,
    Event,
    Finish,
    QueuePolicy,
    ReplicaDied,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicasWanted,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitFailed,
    WorkQueue,
)
from batchinfer.errors import ClusterLost, ModelError, RunInterrupted, SpecError
from batchinfer.progress import ProgressView, SilentProgress
from batchinfer.records import UnitResult, WorkUnit
from batchinfer.spec import JobSpec

logger = logging.getLogger(__name__)

#: How often progress is asked for and drawn, and how often the cluster's size is looked at.
PROGRESS_INTERVAL_S = 1.0
RESIZE_INTERVAL_S = 5.0
#: Longest wait for an answer before signals, backoffs and the lease are looked at again.
MAX_WAIT_S = 0.5


def run(spec: JobSpec, view: ProgressView | None = None) -> JobResult:
    """Generate every row that is not committed yet; returns when no unit is left to try.

    Uses the Ray this process is connected to, if any; else it starts or joins one as ``spec.cluster`` says and
    leaves it again. In the main thread SIGINT and SIGTERM end it with RunInterrupted. May be repeated: what is
    committed is not generated again.

    Raises:
        JobError: the job is wrong; nothing was written.
        LeaseHeld: another run holds the output.
        RunInterrupted: stopped by a signal, or cluster or storage were lost; run again to continue.
    """
    started_s = time.monotonic()
    shown = view or SilentProgress()
    with contextlib.ExitStack() as stack:
        stack.callback(shown.close)
        stop = stack.enter_context(_stopping_on_signals())
        preparation = prepare(spec)
        if not preparation.pending and not preparation.plan_changed:
            return job_result(preparation, preparation.tally(), elapsed_s=time.monotonic() - started_s)
        lease = stack.enter_context(LeaseKeeper(preparation.output, spec.execution.lease_timeout_s))
        # Units that another run committed between the first look and the lease are not pending any more.
        preparation = compare_with_output(preparation.facts, preparation.output)
        record = stack.enter_context(RunRecord(preparation, lease.run_id))
        # Outside the connection: leaving a cluster without its head is a call that hangs, too.
        head = stack.enter_context(HeadWatch())
        if preparation.pending:
            stack.enter_context(connected(spec.cluster))
            if (address := head_address()) is not None:
                head.watch(address)
        return _Run(preparation, lease, record, head, shown, stop, started_s).to_the_end()


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event; a second one ends the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@dataclass(frozen=True, slots=True)
class _Call:
    """An answer awaited from a replica; ``unit`` is set when it is the generation of one."""

    kind: Literal["start", "generate", "progress"]
    replica_id: int
    unit: WorkUnit | None = None


class _Run:
    """One pass of the loop, from the first replica's start to the last commit."""

    def __init__(
        self,
        preparation: Preparation,
        lease: LeaseKeeper,
        record: RunRecord,
        head: HeadWatch,
        view: ProgressView,
        stop: threading.Event,
        started_s: float,
    ) -> None:
        execution = preparation.spec.execution
        self._preparation = preparation
        self._lease = lease
        self._record = record
        self._head = head
        self._view = view
        self._stop = stop
        self._started_s = started_s
        self._first_ready_s: float | None = None
        self._queue = WorkQueue(
            preparation.pending,
            QueuePolicy(
                max_attempts=execution.max_attempts,
                max_start_attempts=execution.max_start_attempts,
                units_in_flight=execution.units_in_flight,
                max_units_held=MAX_UNITS_HELD,
                samples_per_row=preparation.spec.sampling.n,
            ),
        )
        self._shards = {shard.shard_id: shard for shard in preparation.plan.shards}
        self._share = ReplicaShare(0.0, 1.0, 0, 0)
        self._actors: dict[int, ActorHandle[Replica]] = {}
        self._calls: dict[ObjectRef[object], _Call] = {}
        self._ask_progress_at_s: dict[int, float] = {}
        self._tally = preparation.tally()
        self._finish: Finish | None = None

    def to_the_end(self) -> JobResult:
        """Drive until the queue says that nothing more can be done."""
        try:
            self._resize(time.monotonic())
            resize_at_s = show_at_s = time.monotonic() + RESIZE_INTERVAL_S
            while self._finish is None:
                self._check_interruption()
                for ref in self._answered():
                    self._take_answer(ref)
                now_s = time.monotonic()
                wake_at_s = self._queue.wake_at_s
                if wake_at_s is not None and wake_at_s <= now_s:
                    self._handle(Tick(now_s))
                self._ask_for_progress(now_s)
                if now_s >= resize_at_s:
                    resize_at_s = now_s + RESIZE_INTERVAL_S
                    self._resize(now_s)
                if now_s >= show_at_s:
                    show_at_s = now_s + PROGRESS_INTERVAL_S
                    self._show(now_s)
        finally:
            for replica_id in tuple(self._actors):
                self._stop_replica(replica_id)
        return self._result()

    def _check_interruption(self) -> None:
        if self._stop.is_set():
            self._record.event("run_stopped", reason="signal")
            raise RunInterrupted("stopped by a signal; what is committed stays, run again to continue")
        self._lease.check()
        self._head.check()

    def _resize(self, now_s: float) -> None:
        """Look at the cluster: it may have grown or shrunk since."""
        if self._preparation.pending:
            before, self._share = self._share, replica_share(self._preparation.spec.cluster, cluster_nodes())
            if not self._share.num_fitting and self._share != before:
                self._cannot_place()
        self._handle(ReplicasWanted(self._share.num_replicas, now_s))

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

    def _answered(self) -> list[ObjectRef[object]]:
        """Every answer that is there, after waiting for the first one for a moment."""
        refs = list(self._calls)
        if not refs:
            self._stop.wait(MAX_WAIT_S)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=MAX_WAIT_S)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return ready

    def _take_answer(self, ref: ObjectRef[object]) -> None:
        call = self._calls.pop(ref, None)
        if call is None:
            # An answer of the same batch told that its replica is gone, and with it this one is void.
            return
        now_s = time.monotonic()
        try:
            answer: object = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            # Replicas answer with Failure values; what arrives as an exception is a mistake of ours.
            answer = Failure("replica", type(error.cause).__name__, str(error.cause))
        except ray.exceptions.RayError as error:
            answer = Failure("replica", type(error).__name__, _cause_of_death(error))
        match answer:
            case ReplicaStarted():
                self._replica_ready(call.replica_id, answer, now_s)
            case UnitResult() if call.unit is not None:
                self._unit_committed(call.replica_id, answer, now_s)
            case ReplicaProgress():
                self._tally.replica_reported(call.replica_id, answer.stats)
                self._ask_progress_at_s[call.replica_id] = now_s + PROGRESS_INTERVAL_S
            case Failure(scope="unit") if call.unit is not None:
                self._record.event("unit_failed", replica=call.replica_id, unit=call.unit.unit_id, error=str(answer))
                logger.warning("unit %s failed on replica %d: %s", call.unit.unit_id, call.replica_id, answer)
                self._handle(UnitFailed(call.replica_id, call.unit.unit_id, str(answer), now_s))
            case Failure() if call.kind == "start":
                self._start_failed(call.replica_id, answer, now_s)
            case Failure():
                self._replica_died(call.replica_id, answer, now_s)
            case _:
                raise TypeError(f"replica {call.replica_id} answered {type(answer).__name__} to {call.kind}")

    def _replica_ready(self, replica_id: int, started: ReplicaStarted, now_s: float) -> None:
        if replica_id not in self._actors:
            return
        if self._first_ready_s is None:
            self._first_ready_s = now_s
            # Only now: a job whose model cannot be loaded leaves nothing behind.
            self._record.begin()
        self._record.event(
            "replica_ready",
            replica=replica_id,
            engine=started.engine,
            device=started.device,
            node=started.node,
            capacity=started.capacity,
            start_s=round(started.start_s, 3),
        )
        logger.info(
            "replica %d is ready on %s (%s engine, %s, %d sequences at once) after %.1f s",
            replica_id,
            started.node,
            started.engine,
            started.device,
            started.capacity,
            started.start_s,
        )
        self._ask_progress_at_s[replica_id] = now_s
        self._handle(ReplicaReady(replica_id, started.capacity, now_s))

    def _unit_committed(self, replica_id: int, result: UnitResult, now_s: float) -> None:
        self._tally.unit_committed(replica_id, result)
        self._record.unit_committed(replica_id, result)
        self._handle(UnitCommitted(replica_id, result.unit_id, now_s))

    def _start_failed(self, replica_id: int, failure: Failure, now_s: float) -> None:
        if self._actors.pop(replica_id, None) is None:
            return
        self._record.event("replica_start_failed", replica=replica_id, error=str(failure))
        logger.warning("replica %d cannot start: %s", replica_id, failure)
        self._handle(ReplicaStartFailed(replica_id, failure.error, failure.scope == "job", now_s))

    def _replica_died(self, replica_id: int, failure: Failure, now_s: float) -> None:
        if replica_id not in self._actors:
            return
        self._tally.replica_died(replica_id)
        self._record.event("replica_died", replica=replica_id, error=str(failure))
        logger.warning("replica %d died: %s", replica_id, failure)
        # It may be alive but unusable (a broken CUDA context, say); its device is needed for the next one.
        self._stop_replica(replica_id)
        self._handle(ReplicaDied(replica_id, str(failure), now_s))

    def _ask_for_progress(self, now_s: float) -> None:
        for replica_id, due_s in list(self._ask_progress_at_s.items()):
            if due_s <= now_s:
                del self._ask_progress_at_s[replica_id]
                ref: ObjectRef[object] = self._actors[replica_id].progress.remote()
                self._calls[ref] = _Call("progress", replica_id)

    def _handle(self, event: Event) -> None:
        for command in self._queue.handle(event):
            self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case StartReplica(replica_id=replica_id):
                actor = start_actor(self._setup(replica_id), name=f"batchinfer-{self._lease.run_id}-{replica_id}")
                self._actors[replica_id] = actor
                self._calls[actor.start.remote()] = _Call("start", replica_id)
                self._record.event("replica_starting", replica=replica_id)
            case StopReplica(replica_id=replica_id):
                self._stop_replica(replica_id)
            case Assign(replica_id=replica_id, unit=unit, attempt=attempt):
                assignment = Assignment(unit, self._shards[unit.shard_id], attempt)
                self._calls[self._actors[replica_id].generate.remote(assignment)] = _Call("generate", replica_id, unit)
                self._record.event("unit_leased", replica=replica_id, unit=unit.unit_id, attempt=attempt)
            case Finish():
                self._finish = command

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
        )

    def _stop_replica(self, replica_id: int) -> None:
        """End the actor for good. Answers still under way from it are forgotten."""
        actor = self._actors.pop(replica_id, None)
        self._ask_progress_at_s.pop(replica_id, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.replica_id != replica_id}
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _show(self, now_s: float) -> None:
        queue = self._queue
        self._view.show(
            self._tally.progress(
                now_s, now_s - self._started_s, queue.num_ready, queue.num_starting, len(queue.given_up)
            )
        )

    def _result(self) -> JobResult:
        finish, now_s = self._finish, time.monotonic()
        assert finish is not None
        self._record.event("run_finished", outcome=finish.outcome, error=finish.error)
        match finish.outcome:
            case "job_error":
                raise ModelError(finish.error)
            case "cannot_start":
                raise ClusterLost(f"no replica could be started; the last one said: {finish.error}")
            case "replicas_keep_dying":
                raise ClusterLost(f"replicas keep dying before they commit anything; the last one said: {finish.error}")
        # A run that only had a plan to write never saw a replica.
        self._record.begin()
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


def _cause_of_death(error: ray.exceptions.RayError) -> str:
    """The sentence of Ray's page-long message that says how the worker ended, else its first line."""
    text = " ".join(str(error).split())
    match = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]+)", text)
    if match is not None:
        return f"its process ended, {match[1]}: {match[2]}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
