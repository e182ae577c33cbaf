"""A whole run without Ray: driver and replicas are threads of this process, and a death is an exception.

What is real is everything that touches storage: the driver with its loop, work queue, lease and records, the replicas
with their journals and commits. A crash is simulated where it matters, around the calls to storage: from the moment
of its death a process can call storage no more, so what it leaves is what SIGKILL leaves.
"""

import contextlib
import itertools
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal
from unittest import mock

from batchinfer.cluster import driver, run_loop
from batchinfer.cluster.messages import Assignment, ReplicaSetup
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.replica import Replica
from batchinfer.cluster.replica_pool import Answer, ReplicaGone, UnitMethod
from batchinfer.cluster.result import JobResult
from batchinfer.cluster.share import NodeSize
from batchinfer.engine import fake
from batchinfer.progress import SilentProgress
from batchinfer.spec import JobSpec
from batchinfer.storage import failures, lease
from batchinfer.storage.faults import StorageFaults
from batchinfer.storage.layout import JOB

Moment = Literal["before", "halfway", "after"]
#: Threads of one replica: units it may hold, and a start or a drain.
_NUM_THREADS = 6
_RUN_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
#: A number no process has, so that whoever looks for it finds it gone.
_NO_PROCESS = 1 << 30


class SimulatedCrash(BaseException):
    """SIGKILL, as far as storage can tell: nothing between the call and the end of the process handles it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call to storage: whose, what, where (below the output or the input)."""

    role: str
    operation: str
    where: str


#: What happens at one moment of one call; raises, or returns for nothing to happen.
Strike = Callable[[int, Call, Moment], None]


@dataclass
class ProcessFaults:
    """``StorageFaults`` of one simulated process; numbers its calls and lets ``strike`` look at each moment."""

    role: str
    strike: Strike
    calls: list[Call] = field(default_factory=list)
    is_dead: bool = False
    #: The call that it died at.
    died_at: Call | None = None
    on_death: Callable[[], None] = lambda: None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _of_thread: threading.local = field(default_factory=threading.local)

    def before(self, operation: str, where: str) -> None:
        with self._lock:
            self._of_thread.number = len(self.calls)
            self.calls.append(Call(self.role, operation, where))
        self._look("before")

    def halfway(self, operation: str, where: str) -> None:
        self._look("halfway")

    def after(self, operation: str, where: str) -> None:
        self._look("after")

    def die(self) -> None:
        """From now on each call ends in SimulatedCrash."""
        self.is_dead = True

    def _look(self, moment: Moment) -> None:
        if self.is_dead:
            raise SimulatedCrash
        number: int = self._of_thread.number
        try:
            self.strike(number, self.calls[number], moment)
        except SimulatedCrash:
            self.died_at = self.calls[number]
            self.die()
            self.on_death()
            raise


@dataclass
class Plan:
    """A ``FaultPlan`` that remembers the processes it was asked for. Without a strike nothing happens."""

    strike: Strike = lambda number, call, moment: None
    processes: list[ProcessFaults] = field(default_factory=list)

    def of(self, role: str, num_tokens_generated: Callable[[], int]) -> StorageFaults:
        faults = ProcessFaults(role, self.strike)
        self.processes.append(faults)
        return faults

    def calls(self) -> list[Call]:
        return [call for process in self.processes for call in process.calls]


class ThreadPool:
    """``ReplicaPool`` with a few threads for each replica instead of an actor."""

    def __init__(self, plan: Plan, *, outlive_the_driver: bool) -> None:
        self.plan = plan
        self.outlive_the_driver = outlive_the_driver
        self.replicas: dict[int, tuple[Replica, ProcessFaults, ThreadPoolExecutor]] = {}
        self._ended: list[tuple[Replica, ThreadPoolExecutor]] = []
        self._inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def __contains__(self, replica_id: int) -> bool:
        return replica_id in self.replicas

    def start(self, replica_id: int, setup: ReplicaSetup) -> None:
        replica = Replica(replace(setup, chaos=self.plan))
        faults = self.plan.processes[-1]
        faults.on_death = lambda: self._inbox.put(Answer("progress", replica_id, ReplicaGone("simulated", False)))
        threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix=f"replica-{replica_id}")
        self.replicas[replica_id] = (replica, faults, threads)
        self._submit(replica_id, replica.start, lambda value: Answer("start", replica_id, value))

    def assign(self, replica_id: int, method: UnitMethod, assignment: Assignment) -> None:
        carry = getattr(self.replicas[replica_id][0], method)
        self._submit(replica_id, lambda: carry(assignment), lambda it: Answer(method, replica_id, it, assignment))

    def ask_progress(self, replica_id: int) -> None:
        self._submit(
            replica_id, self.replicas[replica_id][0].progress, lambda value: Answer("progress", replica_id, value)
        )

    def drain(self, replica_id: int) -> None:
        self._submit(replica_id, self.replicas[replica_id][0].drain, lambda value: Answer("drain", replica_id, value))

    def stop(self, replica_id: int) -> None:
        if replica_id in self.replicas:
            replica, faults, threads = self.replicas.pop(replica_id)
            faults.die()
            self._ended.append((replica, threads))

    def stop_all(self) -> None:
        if self.outlive_the_driver and self.plan.processes[0].is_dead:
            # The driver is dead, so nobody is there to do this; Ray ends its replicas seconds later.
            return
        for replica_id in tuple(self.replicas):
            self.stop(replica_id)

    def answers(self, timeout_s: float) -> list[Answer]:
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._inbox.get(timeout=timeout_s))
            while True:
                found.append(self._inbox.get_nowait())
        return [answer for answer in found if answer.replica_id in self.replicas]

    def join(self) -> None:
        """Wait for what is still going on, and end every thread."""
        for replica, faults, threads in self.replicas.values():
            threads.shutdown()
            faults.die()
            self._ended.append((replica, threads))
        self.replicas.clear()
        for replica, threads in self._ended:
            if replica._parts is not None:
                replica._parts.engine_loop.close()
            threads.shutdown()
        self._ended.clear()

    def _submit(self, replica_id: int, call: Callable[[], object], answer: Callable[[object], Answer]) -> None:
        def carry() -> None:
            # A replica that has died has said so in on_death.
            with contextlib.suppress(SimulatedCrash):
                self._inbox.put(answer(call()))

        self.replicas[replica_id][2].submit(carry)


_process_numbers = itertools.count(_NO_PROCESS)


@contextlib.contextmanager
def one_machine() -> Iterator[None]:
    """Runs in this block take turns as processes of one machine, and storage errors are retried without waiting."""
    this_machine = lease.Process.current()

    def process() -> lease.Process:
        return replace(this_machine, pid=next(_process_numbers), start_time="x")

    def policy(faults: StorageFaults | None = None) -> failures.RetryPolicy:
        return failures.RetryPolicy(max_attempts=3, initial_s=0.0, max_s=0.0, faults=faults)

    with (
        mock.patch.object(driver, "connected", return_value=contextlib.nullcontext()),
        mock.patch.object(driver, "head_address", return_value=None),
        mock.patch.object(driver, "exported", return_value=SilentProgress()),
        mock.patch.object(run_loop, "cluster_nodes", return_value=[NodeSize(0.0, 4.0)]),
        mock.patch.object(run_loop, "nodes_about_to_go", return_value=frozenset()),
        mock.patch("ray.get_runtime_context", return_value=SimpleNamespace(get_node_id=lambda: "here")),
        mock.patch.object(run_loop, "QueuePolicy", partial(QueuePolicy, backoff_s=0.01)),
        mock.patch.object(driver, "RetryPolicy", policy),
        mock.patch("batchinfer.cluster.replica.RetryPolicy", policy),
        mock.patch.object(lease.Process, "current", side_effect=process),
        # Several steps in a unit, so that there is something to journal, and none of them long.
        mock.patch.object(fake, "_STEP_S", 0.001),
        # A simulated crash is none of the machine: what is written stays.
        mock.patch("os.fsync"),
    ):
        yield


@contextlib.contextmanager
def running(plan: Plan, *, outlive_the_driver: bool = False) -> Iterator[Callable[[JobSpec], JobResult]]:
    """The function that runs a job under ``plan``; replicas that outlive its driver go on to the end of the block."""
    pools: list[ThreadPool] = []

    def pool() -> ThreadPool:
        pools.append(ThreadPool(plan, outlive_the_driver=outlive_the_driver))
        return pools[-1]

    def run(spec: JobSpec) -> JobResult:
        with mock.patch.object(run_loop, "ReplicaPool", pool):
            return driver.run(spec, chaos=plan)

    try:
        yield run
    finally:
        for each in pools:
            each.join()


def run_quietly(spec: JobSpec) -> tuple[JobResult, Plan]:
    """An undisturbed run, and the calls it made."""
    plan = Plan()
    with running(plan) as run:
        return run(spec), plan


@dataclass(frozen=True, slots=True)
class Point:
    """A call as it can be found again in another run: the ``occurrence``-th (0, 1, ...) of its kind in its process."""

    role: str
    operation: str
    #: Below the output, ids of runs left out; for the input as it is.
    place: str
    occurrence: int

    @property
    def kind(self) -> tuple[str, str]:
        """The operation and the directory it is about, or the file under ``_job``."""
        parts = self.place.split("/")
        return self.operation, "/".join(parts[:2]) if parts[0] == JOB else parts[0]


def points(calls: Iterable[Call], output: str) -> list[Point]:
    """The calls of a run as points, in order. ``output`` is where it went."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for call in calls:
        key = (call.role, call.operation, _place(call, output))
        found.append(Point(*key, seen[key]))
        seen[key] += 1
    return found


def crash_at(point: Point, output: str, moment: Moment) -> Strike:
    """Dies at one moment of the call that ``point`` tells of, in a run whose output is ``output``."""
    return _at(point, output, moment, lambda: SimulatedCrash())


def fail_at(point: Point, output: str, moment: Moment, error: Callable[[], Exception]) -> Strike:
    """Raises there, once: the next try of the call goes well."""
    return _at(point, output, moment, error)


def fail_always(point: Point, output: str, moment: Moment, error: Callable[[], Exception]) -> Strike:
    """Raises at every call of the point's kind, whichever process makes it."""

    def strike(number: int, call: Call, now: Moment) -> None:
        if now == moment and point.kind == Point(call.role, call.operation, _place(call, output), 0).kind:
            raise error()

    return strike


def _at(point: Point, output: str, moment: Moment, error: Callable[[], BaseException]) -> Strike:
    lock = threading.Lock()
    numbers: list[int] = []

    def strike(number: int, call: Call, now: Moment) -> None:
        if (call.role, call.operation) != (point.role, point.operation) or _place(call, output) != point.place:
            return
        with lock:
            if number not in numbers:
                numbers.append(number)
            is_due = now == moment and numbers.index(number) == point.occurrence
        if is_due:
            raise error()

    return strike


def _place(call: Call, output: str) -> str:
    _, name, below = call.where.partition(output.rpartition("/")[2])
    return _RUN_ID.sub("<run>", below.strip("/")) if name else "input"
