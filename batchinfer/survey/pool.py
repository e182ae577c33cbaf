"""Worker processes, started anew so that nothing heavy enters the command's own, and gone when it is."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event

from batchinfer.errors import RunInterrupted


@contextmanager
def worker_pool(
    num_workers: int, start: Callable[..., None], setup: object, killed: str
) -> Iterator[ProcessPoolExecutor]:
    """Processes that have called ``start(setup, stop)``. Whatever ends the block, ``stop`` is set and they end.

    Raises RunInterrupted with the text ``killed`` when one is killed.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (start, setup, stop))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RunInterrupted(killed) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None], setup: object, stop: Event) -> None:
    # Ctrl-C reaches the whole group; the command's own process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    start(setup, stop)


def _end_with_parent() -> None:
    """A command that was killed must not leave workers waiting for tasks."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
