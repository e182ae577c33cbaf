"""Holds the output's lease for as long as a run goes on, with a heartbeat on a thread of its own.

The heartbeat must not wait for the driver's loop, nor the loop for a slow object store.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType

from batchinfer.errors import BatchinferError, LeaseLost
from batchinfer.storage.layout import remove_if_unused
from batchinfer.storage.lease import Lease, acquire
from batchinfer.storage.location import Location

logger = logging.getLogger(__name__)

Acquire = Callable[[Location, str, float], Lease]

#: Heartbeats per timeout: several may fail before anyone takes the output over.
BEATS_PER_TIMEOUT = 6


def new_run_id() -> str:
    """Sorts by start: ``20260131T235959-1a2b3c``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


class LeaseKeeper:
    """Context manager: acquires on construction, beats inside the block, releases at its end.

    Raises:
        LeaseHeld: another live run holds the output.
    """

    def __init__(self, output: Location, timeout_s: float, *, acquire: Acquire = acquire) -> None:
        """``acquire``: that of ``storage.lease``, or its ``take_over``."""
        self.run_id = new_run_id()
        self._output = output
        self._timeout_s = timeout_s
        self._interval_s = timeout_s / BEATS_PER_TIMEOUT
        self._lease = acquire(output, self.run_id, timeout_s)
        self._doubtful_at_s = _now_s() + timeout_s
        self._beating = threading.Lock()
        self._ended = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            # A crash before this line leaves a lease that the next run on this machine takes over at once.
            self._lease.release()
            remove_if_unused(self._output)
        except BatchinferError as failed:
            # What the run came to must not change because of it.
            logger.warning("lease: not released: %s; it goes stale after %g s", failed, self._timeout_s)

    def check(self) -> None:
        """Raise LeaseLost once another run holds the output; give replicas nothing to do after that.

        A run that has not beaten for as long as its lease lasts (it was stopped, or its machine was) looks at the
        lease before it goes on, which may wait for the storage.
        """
        now_s = _now_s()
        if self._lost is None and now_s > self._doubtful_at_s:
            self._doubtful_at_s = now_s + self._interval_s
            self._beat()
        if self._lost is not None:
            raise self._lost

    def _keep(self) -> None:
        while self._lost is None and not self._ended.wait(self._interval_s):
            self._beat()

    def _beat(self) -> None:
        with self._beating:
            at_s = _now_s()
            try:
                self._lease.heartbeat()
            except LeaseLost as error:
                self._lost = error
            except BatchinferError as error:
                # One beat of several per timeout; storage that stays away is found by the commits as well.
                logger.warning("lease: heartbeat failed: %s", error)
            else:
                self._doubtful_at_s = at_s + self._timeout_s


def _now_s() -> float:
    """Seconds that go on while the machine sleeps, unlike ``time.monotonic``."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
