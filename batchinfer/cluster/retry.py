"""``retry-failed``: the dead letters of an output, and nothing else, through replicas once more."""

import threading
from collections.abc import Sequence

from batchinfer.cluster.driver import OutputWork, drive
from batchinfer.cluster.result import JobResult
from batchinfer.cluster.retry_prepare import look_at_output, prepare_retry
from batchinfer.progress import ProgressView
from batchinfer.spec import JobSpec
from batchinfer.storage.faults import FaultPlan


def retry_failed(
    spec: JobSpec,
    view: ProgressView | None = None,
    *,
    error_types: Sequence[str] = (),
    stop: threading.Event | None = None,
    takeover: bool = False,
    chaos: FaultPlan | None = None,
) -> JobResult:
    """Generate the dead letters of the job's output, only those of ``error_types`` where any are given.

    The job may have other limits than the output's (see ``retry_prepare.MAY_CHANGE``). At every moment each row is
    completed or a dead letter, never both or neither; what fails again stays one, with its new reason. Rows that were
    never tried are ``run``'s: while units are missing the result is unfinished. Units of the result that are not
    committed are those that this retry did not get through; ``num_completions`` are new ones. May be repeated. The
    other arguments, Ray and signals are as in ``driver.run``.

    Raises:
        JobError: the job is wrong, generates something else, or has no output yet; nothing was written.
        LeaseHeld: another run holds the output.
        RunInterrupted: stopped, or cluster or storage were lost; retry again to continue.
    """
    kinds = tuple(error_types)
    work = OutputWork(
        lambda policy: prepare_retry(spec, kinds, policy),
        lambda found: look_at_output(found.facts, found.output, kinds),
    )
    return drive(work, view, stop=stop, takeover=takeover, chaos=chaos)
