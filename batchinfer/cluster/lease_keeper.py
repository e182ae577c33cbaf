"""Holds the output's lease for as long as a run goes on, with a heartbeat on a thread of its own.

The heartbeat must not wait for the driver's loop, nor the loop for a slow object store.
"""

import logging
import os
import threading
from datetime import UTC, datetime
from types import TracebackType

from batchinfer.errors import BatchinferError, LeaseLost
from batchinfer.storage.layout import remove_if_unused
from batchinfer.storage.lease import acquire
from batchinfer.storage.location import Location

logger = logging.getLogger(__name__)

#: Heartbeats per timeout: several may fail before anyone takes the output over.
BEATS_PER_TIMEOUT = 6


def new_run_id() -> str:
    """Sorts by start: ``20260131T235959-1a2b3c``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"


class LeaseKeeper:
    """Context manager: acquires on construction, releases at the end of the block.

    Raises:
        LeaseHeld: another live run holds the output.
    """

    def __init__(self, output: Location, timeout_s: float) -> None:
        self.run_id = new_run_id()
        self._output = output
        self._lease = acquire(output, self.run_id, timeout_s)
        self._interval_s = timeout_s / BEATS_PER_TIMEOUT
        self._ended = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        # A crash before this line leaves a lease that the next run on this machine takes over at once.
        self._lease.release()
        remove_if_unused(self._output)

    def check(self) -> None:
        """Raise LeaseLost once another run holds the output; publish nothing after that."""
        if self._lost is not None:
            raise self._lost

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._lease.heartbeat()
            except LeaseLost as error:
                self._lost = error
                return
            except BatchinferError as error:
                # One beat of several per timeout; storage that stays away is found by the commits as well.
                logger.warning("lease: heartbeat failed: %s", error)
