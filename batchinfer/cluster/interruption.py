"""What SIGINT and SIGTERM do to a run: the first one asks it to drain, a second one or a deadline ends the process.

Python runs a signal's handler only when its main thread comes back from whatever C code it is in, which may be
minutes inside Ray. The two hard endings therefore hang on the wake-up descriptor, which the C side of Python writes
at once, read by a thread of their own.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from batchinfer.errors import EXIT_RUN_AGAIN, RunInterrupted

#: From the first signal to the end of the process, whatever hangs. The promise is 10 s.
EXIT_DEADLINE_S = 9.5

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDED = 0


class _BrokenOff(KeyboardInterrupt):
    """Raised out of a signal's handler; no ``except Exception`` on its way may swallow it."""


class Interruption:
    """Context manager around a run. Outside the main thread it installs nothing and only ``stop`` counts."""

    def __init__(
        self,
        stop: threading.Event | None = None,
        *,
        deadline_s: float = EXIT_DEADLINE_S,
        end: Callable[[str], None] | None = None,
    ) -> None:
        """``stop`` is set by the first signal, or by whoever else wants the run to drain.

        ``end`` gets the reason when the process has to end on the spot; by default it prints it and ends it.
        """
        self._stop = stop or threading.Event()
        self._deadline_s = deadline_s
        self._end = end or _end_process
        self._breaks_off = False
        self._before: dict[signal.Signals, object] = {}

    @property
    def is_asked(self) -> bool:
        """Whether the run is to drain."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raise RunInterrupted once the run is asked to stop; for the time before it has anything to drain."""
        if self._stop.is_set():
            raise RunInterrupted("stopped before anything was generated; run the same command again to continue")

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """A block that a signal may leave at any line, because nothing it does has to be finished.

        Raises:
            RunInterrupted: a signal came, now or before.
        """
        self.check()
        self._breaks_off = True
        try:
            with _swallowed_in_silence():
                yield
        except _BrokenOff:
            pass
        finally:
            self._breaks_off = False
        self.check()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
            self._read_end, self._write_end = socket.socketpair()
            self._write_end.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        for number, previous in self._before.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
        self._write_end.send(bytes([_ENDED]))
        self._thread.join()
        self._read_end.close()
        self._write_end.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if self._breaks_off:
            self._breaks_off = False
            raise _BrokenOff

    def _watch(self) -> None:
        """Every signal that Python handles arrives here as one byte, its number."""
        num_asked, end_at_s = 0, math.inf
        while True:
            try:
                self._read_end.settimeout(None if end_at_s == math.inf else max(0.001, end_at_s - time.monotonic()))
                received = self._read_end.recv(1)[0]
            except TimeoutError:
                self._end(f"not stopped {self._deadline_s:g} s after the signal; something hangs")
                return
            if received == _ENDED:
                return
            if received in _SIGNALS:
                num_asked += 1
                self._stop.set()
                end_at_s = min(end_at_s, time.monotonic() + self._deadline_s)
            if num_asked > 1:
                self._end("a second signal: stopped at once")
                return


@contextlib.contextmanager
def _swallowed_in_silence() -> Iterator[None]:
    """A signal that meets a finalizer or a hook around a fork raises where Python cannot let it out.

    Python would print a traceback and go on; the block then runs to its end, or to the deadline, and what follows it
    looks whether a signal came.
    """
    before = sys.unraisablehook

    def silent(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, _BrokenOff):
            before(unraisable)

    sys.unraisablehook = silent
    try:
        yield
    finally:
        sys.unraisablehook = before


def _end_process(reason: str) -> None:
    # What stays behind is what any crash leaves: parts and journal segments that are whole, and a lease that the
    # next run on this machine takes over at once. Ray ends the replicas of a driver that is gone.
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
    print(f"Error: {reason}; what is committed stays, run the same command again", file=sys.stderr, flush=True)
    os._exit(EXIT_RUN_AGAIN)
