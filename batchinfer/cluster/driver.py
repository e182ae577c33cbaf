"""The driver: what a run holds on to while its loop goes on, taken in order and given back whatever happens.

Whatever moment this process dies at, the next run continues: parts and journals are published by the replicas, and
all that is kept here can be listed again.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from batchinfer.cluster.errors_repair import mend_errors_parts
from batchinfer.cluster.head_watch import HeadWatch
from batchinfer.cluster.interruption import Interruption
from batchinfer.cluster.lease_keeper import LeaseKeeper
from batchinfer.cluster.metrics_export import exported
from batchinfer.cluster.prepare import Preparation, compare_with_output, prepare
from batchinfer.cluster.ray_cluster import await_head, connected, head_address
from batchinfer.cluster.replica_spans import traced
from batchinfer.cluster.result import JobResult, job_result
from batchinfer.cluster.run_limits import RunLimits
from batchinfer.cluster.run_loop import RunLoop
from batchinfer.cluster.run_record import RunRecord
from batchinfer.progress import ProgressView, SeveralViews, SilentProgress
from batchinfer.spec import JobSpec
from batchinfer.speeds import remember_speed, speeds_file
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.faults import FaultPlan
from batchinfer.storage.lease import acquire, take_over


@dataclass(frozen=True, slots=True)
class OutputWork:
    """What sets a run apart from other passes over an output that need the lease, replicas and the loop."""

    #: What there is to do, from job and output as they are; before the lease, and once more when it is held.
    prepare: Callable[[RetryPolicy], Preparation]
    look_again: Callable[[Preparation], Preparation]


def run(
    spec: JobSpec,
    view: ProgressView | None = None,
    *,
    stop: threading.Event | None = None,
    takeover: bool = False,
    chaos: FaultPlan | None = None,
) -> JobResult:
    """Generate every row that is not committed yet; returns when no unit is left to try.

    Uses the Ray this process is connected to, if any; else it starts or joins one as ``spec.cluster`` says and
    leaves it again. ``stop``, once set, has the same effect as a first SIGINT or SIGTERM in the main thread: what is
    in flight is journaled and RunInterrupted raised, within ten seconds. ``takeover`` takes the output from a run
    that holds it. ``chaos`` breaks storage calls on purpose. May be repeated: what is committed is not generated
    again.

    Raises:
        JobError: the job is wrong; nothing was written.
        PoorQuality: the completions pass a limit of ``spec.quality``; what was committed and journaled stays.
        AllowanceSpent: ``execution.deadline`` or ``max_gpu_hours`` is used up; what was committed and journaled stays.
        LeaseHeld: another run holds the output.
        RunInterrupted: stopped, or cluster or storage were lost; run again to continue.
    """
    work = OutputWork(
        lambda policy: prepare(spec, policy), lambda found: compare_with_output(found.facts, found.output)
    )
    return drive(work, view, stop=stop, takeover=takeover, chaos=chaos)


def drive(
    work: OutputWork,
    view: ProgressView | None = None,
    *,
    stop: threading.Event | None = None,
    takeover: bool = False,
    chaos: FaultPlan | None = None,
) -> JobResult:
    """Do ``work`` on replicas; the rest is as :func:`run` says."""
    started_s = time.monotonic()
    shown = view or SilentProgress()
    with contextlib.ExitStack() as stack:
        stack.callback(shown.close)
        interruption = stack.enter_context(Interruption(stop))
        policy = RetryPolicy(faults=chaos.of("driver", lambda: 0) if chaos is not None else None)
        with interruption.breaking_off():
            preparation = work.prepare(policy)
            limits = RunLimits(preparation)
            limits.check()
        if preparation.is_settled:
            return job_result(preparation, preparation.tally(), elapsed_s=time.monotonic() - started_s)
        spec = preparation.spec
        lease = stack.enter_context(
            LeaseKeeper(preparation.output, spec.execution.lease_timeout_s, acquire=take_over if takeover else acquire)
        )
        with interruption.breaking_off():
            # Units that another run committed between the first look and the lease are not pending any more.
            preparation = work.look_again(preparation)
        mend_errors_parts(preparation)
        record = stack.enter_context(RunRecord(preparation, lease.run_id))
        replica_spans = stack.enter_context(traced(preparation, lease.run_id))
        # Outside the connection: leaving a cluster without its head is a call that hangs, too.
        head = stack.enter_context(HeadWatch())
        if preparation.pending:
            with interruption.breaking_off():
                await_head(spec.cluster)
            # Not to be broken off: what Ray has begun to start it must come to know, or it does not end it.
            stack.enter_context(connected(spec.cluster))
            interruption.check()
            if (address := head_address()) is not None:
                head.watch(address)
            if spec.telemetry.metrics:
                shown = SeveralViews(shown, exported(preparation, lease.run_id))
        loop = RunLoop(preparation, lease, record, head, shown, interruption, chaos, started_s, limits, replica_spans)
        result = loop.to_the_end()
        # A run that breaks itself, or tries what others have left, tells nothing of the next one.
        if chaos is None and preparation.retry is None and (speed := record.speed()) is not None:
            remember_speed(speed, speeds_file())
        return result
