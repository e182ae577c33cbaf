"""Carries out in one process what ``chaos`` decides for its storage calls: sleeps, errors, SIGKILL, a stolen lease.

Each process notes under ``_job/chaos/``, past the faults, what it has generated and how chaos ended it; the supervisor
(``chaos_run``) counts there.
"""

import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

from batchinfer.chaos import DRIVER, NUM_ERRORS, CallFaults, Chaos, KillMoment
from batchinfer.errors import BatchinferError
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.layout import JOB, lease_file, staging
from batchinfer.storage.lease import Process, read_lease
from batchinfer.storage.location import Location

logger = logging.getLogger(__name__)

CHAOS = f"{JOB}/chaos"
#: Run id of the lease's thief.
NOBODY = "chaos-nobody"


@dataclass(frozen=True, slots=True)
class ProcessNote:
    """What a process of a run under chaos has done so far; ``death`` is "" while chaos has not ended it."""

    run_number: int
    role: str
    num_tokens: int
    death: str = ""

    @property
    def of_driver(self) -> bool:
        return self.role == DRIVER


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """A ``FaultPlan``: travels to replicas by value."""

    chaos: Chaos
    output_uri: str
    storage_options: StorageOptions

    def of(self, role: str, num_tokens_generated: Callable[[], int]) -> "ChaosFaults":
        """The faults of one process, whose notes go to the output."""
        return ChaosFaults(self.chaos, role, locate(self.output_uri, self.storage_options), num_tokens_generated)


class ChaosFaults:
    """``StorageFaults`` of one process."""

    def __init__(
        self,
        chaos: Chaos,
        role: str,
        output: Location,
        num_tokens_generated: Callable[[], int],
        *,
        sleep: Callable[[float], None] = time.sleep,
        end_process: Callable[[], None] | None = None,
    ) -> None:
        """``output`` is where notes go; it must not ask these faults again."""
        self._chaos = chaos
        self._role = role
        self._output = output
        self._num_tokens_generated = num_tokens_generated
        self._sleep = sleep
        self._end_process = end_process or _kill_this_process
        self._lock = threading.Lock()
        self._num_calls = 0
        self._of_thread = threading.local()

    def before(self, operation: str, where: str) -> None:
        with self._lock:
            number, self._num_calls = self._num_calls, self._num_calls + 1
        faults = self._chaos.of_call(self._role, number)
        self._of_thread.current = (number, faults)
        if faults.delay_s:
            self._sleep(faults.delay_s)
        if faults.expire_lease:
            steal_lease(self._output)
        self._die_if_due("before", operation)
        if faults.fail == "before":
            raise _error(faults.error)

    def halfway(self, operation: str, where: str) -> None:
        self._die_if_due("halfway", operation)

    def after(self, operation: str, where: str) -> None:
        self._die_if_due("after", operation)
        if self._role != DRIVER and operation in {"write_replace", "create_exclusive"}:
            # A replica that dies with its driver cannot note anything then.
            self._note("")
        _, faults = self._current()
        if faults.fail == "after":
            raise _error(faults.error)

    def _current(self) -> tuple[int, CallFaults]:
        found: tuple[int, CallFaults] = self._of_thread.current
        return found

    def _die_if_due(self, moment: KillMoment, operation: str) -> None:
        number, faults = self._current()
        if faults.kill == moment:
            self._note(f"{moment} {operation}, call {number}")
            self._end_process()

    def _note(self, death: str) -> None:
        note = ProcessNote(self._chaos.run_number, self._role, self._num_tokens_generated(), death)
        place = self._output.child(f"{CHAOS}/run-{note.run_number:04d}-{note.role}.json")
        try:
            place.write_replace(json.dumps(asdict(note)).encode() + b"\n", staging(self._output))
        except BatchinferError as error:
            logger.warning("chaos: %s cannot note what it does: %s", self._role, error)


def read_notes(output: Location) -> list[ProcessNote]:
    """The notes of every process of the runs under chaos."""
    notes = output.child(CHAOS)
    return [ProcessNote(**json.loads(notes.child(name).read_bytes())) for name in sorted(notes.names())]


def remove_notes(output: Location) -> None:
    """Forget earlier chaos."""
    for name in output.child(CHAOS).names():
        output.child(CHAOS).child(name).remove()


def steal_lease(output: Location) -> None:
    """Give the lease to a run that does not exist, if this process holds it; another run's lease is left alone."""
    try:
        lease = read_lease(output)
        if lease is None or lease.process != Process.current():
            return
        long_ago = datetime.now(UTC) - timedelta(days=1)
        thief = replace(lease.process, host="nowhere", pid=0, boot_id="")
        stolen = replace(lease, run_id=NOBODY, epoch=lease.epoch + 1, heartbeat_at=long_ago.isoformat(), process=thief)
        lease_file(output).write_replace(json.dumps(asdict(stolen)).encode() + b"\n", staging(output))
    except BatchinferError as error:
        logger.warning("chaos: the lease cannot be stolen: %s", error)


def _error(number: int) -> OSError:
    """One of the errors that a storage gives and that pass."""
    errors = (
        TimeoutError("injected by --chaos: timed out"),
        ConnectionResetError("injected by --chaos: connection reset"),
        OSError(errno.EBUSY, "injected by --chaos: SlowDown"),
        OSError(errno.EIO, "injected by --chaos: input/output error"),
    )
    assert len(errors) == NUM_ERRORS
    return errors[number]


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal takes this thread at the latest here.
    signal.pause()
