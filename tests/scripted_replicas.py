"""Replicas that answer as a test says, in the place of Ray's actors: the driver's loop as it is, at any scale."""

import threading
from collections import deque
from collections.abc import Callable, Mapping

import pytest

from batchinfer.cluster import run_loop
from batchinfer.cluster.head_watch import HeadWatch
from batchinfer.cluster.interruption import Interruption
from batchinfer.cluster.lease_keeper import LeaseKeeper
from batchinfer.cluster.messages import Assignment, Drained, ReplicaProgress, ReplicaSetup, ReplicaStarted
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.replica_pool import Answer, UnitMethod
from batchinfer.cluster.replica_spans import ReplicaSpans
from batchinfer.cluster.result import JobResult
from batchinfer.cluster.run_limits import RunLimits
from batchinfer.cluster.run_loop import RunLoop
from batchinfer.cluster.run_record import RunRecord
from batchinfer.cluster.share import NodeSize
from batchinfer.engine.engine import EngineStats
from batchinfer.progress import SilentProgress
from batchinfer.records import UnitResult
from batchinfer.tracing import NoSpans, Spans

#: (replica id, assignment or None) -> what the replica answers; None = it never does.
Script = Callable[[int, Assignment | None], object]


def committed(assignment: Assignment) -> UnitResult:
    """The unit with one token a row."""
    num_rows = assignment.unit.num_rows
    return UnitResult(assignment.unit.unit_id, num_rows, num_rows, 0, num_rows, num_rows, 0.0)


class ScriptedPool:
    """Answers every call at once, in the order of the calls; a method without a script behaves well."""

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self._scripts = scripts
        self._living: set[int] = set()
        self._answers: deque[Answer] = deque()
        self.stopped: list[int] = []

    def __contains__(self, replica_id: int) -> bool:
        return replica_id in self._living

    def start(self, replica_id: int, setup: ReplicaSetup) -> None:
        self._living.add(replica_id)
        self._answer("start", replica_id, ReplicaStarted(64, "fake", "none", "host", 0.0, node_id=f"node-{replica_id}"))

    def assign(self, replica_id: int, method: UnitMethod, assignment: Assignment) -> None:
        self._answer(method, replica_id, committed(assignment), assignment)

    def ask_progress(self, replica_id: int) -> None:
        self._answer("progress", replica_id, ReplicaProgress(EngineStats(num_steps=1)))

    def drain(self, replica_id: int) -> None:
        self._answer("drain", replica_id, Drained(1, 2))

    def stop(self, replica_id: int) -> None:
        if replica_id in self._living:
            self._living.discard(replica_id)
            self.stopped.append(replica_id)

    def stop_all(self) -> None:
        for replica_id in tuple(self._living):
            self.stop(replica_id)

    def answers(self, timeout_s: float) -> list[Answer]:
        if not self._answers:
            threading.Event().wait(min(timeout_s, 0.01))
        found = [self._answers.popleft() for _ in range(min(16, len(self._answers)))]
        return [answer for answer in found if answer.replica_id in self._living]

    def _answer(
        self,
        method: UnitMethod | str,
        replica_id: int,
        usual: object,
        assignment: Assignment | None = None,
    ) -> None:
        script = self._scripts.get(method)
        value = usual if script is None else script(replica_id, assignment)
        if value is not None:
            self._answers.append(Answer(method, replica_id, value, assignment))  # type: ignore[arg-type]


def run_scripted(
    monkeypatch: pytest.MonkeyPatch,
    preparation: Preparation,
    scripts: Mapping[str, Script],
    *,
    num_replicas: int = 1,
    stop: threading.Event | None = None,
    going: Callable[[], frozenset[str]] = frozenset,
    spans: Spans = NoSpans(),  # noqa: B008 - has no state
) -> JobResult:
    """The loop over scripted replicas, one to a node; ``going`` are the nodes that were given notice."""
    monkeypatch.setattr(run_loop, "ReplicaPool", lambda: ScriptedPool(scripts))
    monkeypatch.setattr(run_loop, "cluster_nodes", lambda: [NodeSize(1.0, 1.0)] * num_replicas)
    monkeypatch.setattr(run_loop, "nodes_about_to_go", going)
    monkeypatch.setattr(run_loop, "CLUSTER_INTERVAL_S", 0.05)
    with (
        Interruption(stop) as interruption,
        LeaseKeeper(preparation.output, 60.0) as lease,
        RunRecord(preparation, lease.run_id) as record,
        HeadWatch() as head,
    ):
        limits, spans = RunLimits(preparation), ReplicaSpans(spans, None)
        loop = RunLoop(preparation, lease, record, head, SilentProgress(), interruption, None, 0.0, limits, spans)
        return loop.to_the_end()
