"""Notices that the cluster's head is gone before Ray does.

Ray waits a minute in whatever call is under way, then ends the process itself, without an exception and with exit
code 1, which for batchinfer means that the job is finished but for its dead letters.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from batchinfer.errors import EXIT_RUN_AGAIN, ClusterLost

PROBE_INTERVAL_S = 2.0
#: A head that restarts (one with a store of its own may) is given this long ...
LOST_AFTER_S = 40.0
#: ... and a driver that hangs in a call to Ray this long, which must be less than Ray's minute.
GIVE_UP_AFTER_S = 50.0


class HeadWatch:
    """Context manager: from :meth:`watch` to the end of the block, tries the head's port on a thread of its own."""

    def __init__(
        self,
        give_up: Callable[[str], None] | None = None,
        *,
        interval_s: float = PROBE_INTERVAL_S,
        lost_after_s: float = LOST_AFTER_S,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        """``give_up`` gets the reason when the block has not ended in time; by default it ends the process."""
        self._give_up = give_up or _end_process
        self._interval_s = interval_s
        self._lost_after_s = lost_after_s
        self._give_up_after_s = give_up_after_s
        self._ended = threading.Event()
        self._reason: str | None = None

    def __enter__(self) -> "HeadWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def watch(self, address: str) -> None:
        """Begin; ``address`` is ``host:port`` of the head."""
        threading.Thread(target=self._probe, args=(address,), name="head", daemon=True).start()

    def check(self) -> None:
        """Raise ClusterLost once the head has been silent for too long."""
        if self._reason is not None:
            raise ClusterLost(self._reason)

    def _probe(self, address: str) -> None:
        answered_at_s = time.monotonic()
        while not self._ended.wait(self._interval_s):
            if _answers(address, self._interval_s):
                answered_at_s, self._reason = time.monotonic(), None
                continue
            silent_s = time.monotonic() - answered_at_s
            reason = (
                f"the head of the Ray cluster at {address} has not answered for {silent_s:.0f} s; "
                "what is committed stays, run again when it is back"
            )
            if silent_s >= self._give_up_after_s:
                self._give_up(reason)
                return
            if silent_s >= self._lost_after_s:
                self._reason = reason


def _answers(address: str, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def _end_process(reason: str) -> None:
    # The main thread hangs inside Ray and cannot be told. What stays behind is what any crash leaves: parts that
    # are published, and a lease that the next run takes over.
    print(f"Error: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_RUN_AGAIN)
