"""A first signal asks, a second one or the deadline ends, whatever the main thread is doing."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from batchinfer.cluster.interruption import Interruption
from batchinfer.errors import EXIT_RUN_AGAIN, RunInterrupted

DEADLINE_S = 30.0


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = threading.Event()
    with Interruption(stop, end=pytest.fail) as interruption:
        interruption.check()
        send(number)
        assert stop.wait(DEADLINE_S)
        assert interruption.is_asked
        with pytest.raises(RunInterrupted, match="run the same command again"):
            interruption.check()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_block_that_needs_no_end_is_left_at_once() -> None:
    with Interruption(end=pytest.fail) as interruption:
        began_s = time.monotonic()
        threading.Timer(0.05, send, [signal.SIGTERM]).start()
        # Libraries on the way may suppress exceptions, and it must not help them.
        with pytest.raises(RunInterrupted), interruption.breaking_off(), contextlib.suppress(Exception):
            time.sleep(DEADLINE_S)
        assert time.monotonic() - began_s < DEADLINE_S / 2


class SignalsInItsFinalizer:
    """Python swallows what a finalizer raises, as it does in the hooks around a fork."""

    def __init__(self, also: BaseException | None = None) -> None:
        self._also = also

    def __del__(self) -> None:
        if self._also is not None:
            raise self._also
        send(signal.SIGTERM)
        time.sleep(0.01)


def test_a_signal_that_python_swallows_is_seen_at_the_end_of_the_block_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_value))
    ours = sys.unraisablehook
    mistake = ValueError("a finalizer's own mistake is printed as ever")
    ends: list[str] = []

    def block() -> None:
        SignalsInItsFinalizer()
        SignalsInItsFinalizer(mistake)
        ends.append("reached")

    with Interruption(end=pytest.fail) as interruption:
        with pytest.raises(RunInterrupted), interruption.breaking_off():
            block()
        assert sys.unraisablehook is ours
    assert ends == ["reached"]
    assert printed == [mistake]


def test_a_signal_before_the_block_keeps_it_from_beginning() -> None:
    stop = threading.Event()
    with Interruption(stop, end=pytest.fail) as interruption:
        send(signal.SIGINT)
        assert stop.wait(DEADLINE_S)
        with pytest.raises(RunInterrupted), interruption.breaking_off():
            pytest.fail("began")


def test_an_exit_that_no_signal_asked_for_is_left_alone() -> None:
    with Interruption(end=pytest.fail) as interruption:
        with pytest.raises(SystemExit), interruption.breaking_off():
            raise SystemExit(5)
        interruption.check()


def test_a_second_signal_ends_it() -> None:
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    with Interruption(stop, end=reasons.put):
        send(signal.SIGTERM)
        assert stop.wait(DEADLINE_S)
        send(signal.SIGINT)
        assert "second signal" in reasons.get(timeout=DEADLINE_S)


def test_the_deadline_counts_from_the_first_signal_and_other_signals_do_not_move_it() -> None:
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with Interruption(deadline_s=0.3, end=reasons.put):
            send(signal.SIGUSR1)
            time.sleep(0.05)
            assert reasons.empty()
            send(signal.SIGTERM)
            asked_s = time.monotonic()
            while reasons.empty() and time.monotonic() - asked_s < DEADLINE_S:
                send(signal.SIGUSR1)
                time.sleep(0.02)
            assert "not stopped 0.3 s after the signal" in reasons.get_nowait()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_a_signal_there_is_no_deadline() -> None:
    stop = threading.Event()
    with Interruption(stop, deadline_s=0.05, end=pytest.fail):
        assert not stop.wait(0.2)


def test_in_another_thread_only_the_callers_event_counts() -> None:
    stop, seen = threading.Event(), []

    def body() -> None:
        with Interruption(stop, end=pytest.fail) as interruption:
            seen.append(signal.getsignal(signal.SIGTERM))
            stop.set()
            seen.append(interruption.is_asked)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM), True]


@pytest.mark.parametrize(("num_signals", "deadline_s"), [(2, 60.0), (1, 0.2)], ids=["second-signal", "deadline"])
def test_a_main_thread_that_hangs_in_c_code_cannot_hold_the_process(num_signals: int, deadline_s: float) -> None:
    """A mutex that it waits for is taken by itself: no Python of this thread runs any more."""
    script = (
        "import ctypes\n"
        "from batchinfer.cluster.interruption import Interruption\n"
        f"with Interruption(deadline_s={deadline_s}):\n"
        "    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    libc.pthread_mutex_init(mutex, None)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        for _ in range(num_signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == EXIT_RUN_AGAIN
        assert "run the same command again" in errors
    finally:
        process.kill()
