"""A cluster in virtual time: the real work queue, replicas that are a few numbers each.

A replica works on as many units at once as its capacity has room for, at least on one, each for about ``unit_s``,
and on the others it holds after these. Replicas die at random, with everything
they hold; what they had begun is redone from its start (no journal here, so the numbers err on the dark side).
"""

import heapq
import random
import time
from collections import deque
from dataclasses import dataclass, field

from batchinfer.cluster.queue_messages import (
    Assign,
    Command,
    Event,
    Finish,
    Probe,
    ReplicaDied,
    ReplicaProgressed,
    ReplicaReady,
    ReplicasWanted,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitProbed,
)
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.work_queue import WorkQueue
from batchinfer.records import WorkUnit

UNITS_PER_SHARD = 1000


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    num_units: int
    num_replicas: int
    rows_per_unit: int = 1024
    capacity: int = 256
    unit_s: float = 60.0
    #: A unit takes its time plus or minus this share of it.
    jitter: float = 0.3
    start_s: float = 120.0
    deaths_per_replica_hour: float = 0.01
    #: This share of the replicas joins at random moments of the first half of the job.
    late_share: float = 0.3
    progress_interval_s: float = 60.0
    seed: int = 0


@dataclass(slots=True)
class Course:
    """What came of it; times in virtual seconds but for ``queue_s``."""

    outcome: str = ""
    end_s: float = 0.0
    #: When the same work would have ended had every ready replica worked all the time.
    ideal_end_s: float = 0.0
    num_commits: int = 0
    num_deaths: int = 0
    num_units_redone: int = 0
    num_events: int = 0
    #: Processor time spent inside the queue, on this machine.
    queue_s: float = 0.0
    #: The longest that a unit waited to be given out again after its replica died.
    longest_wait_s: float = 0.0
    #: Share of their time that ready replicas held nothing, before the last unit was first given out.
    idle_share: float = 0.0

    @property
    def tail_s(self) -> float:
        return self.end_s - self.ideal_end_s


@dataclass(slots=True)
class _Replica:
    #: When each of the places for a unit is free again, a heap.
    free_at_s: list[float]
    #: When each unit began or is to begin.
    held: dict[str, float] = field(default_factory=dict)
    num_signs_of_life: int = 0


class Simulation:
    """One run; :meth:`step` advances by one event, so that a test may look in between."""

    def __init__(self, cluster: Cluster, policy: QueuePolicy | None = None) -> None:
        self._cluster = cluster
        self._dice = random.Random(cluster.seed)
        units = [
            WorkUnit(
                f"{index // UNITS_PER_SHARD:016x}",
                index % UNITS_PER_SHARD * cluster.rows_per_unit,
                cluster.rows_per_unit,
            )
            for index in range(cluster.num_units)
        ]
        self.queue = WorkQueue(units, policy or QueuePolicy())
        self.course = Course()
        self._at_once = max(1, cluster.capacity // cluster.rows_per_unit)
        self._now_s = 0.0
        self._order = 0
        self._coming: list[tuple[float, int, Event]] = []
        self._replicas: dict[int, _Replica] = {}
        self._returned_at_s: dict[str, float] = {}
        self._given_out: set[str] = set()
        self._all_given_out_at_s = 0.0
        self._worked_s = 0.0
        #: (moment, +1 or -1): ready replicas come and go; the ideal end is read off it.
        self._changes: deque[tuple[float, int]] = deque()
        self._idle_since_s: dict[int, float] = {}
        self._idle_s = 0.0
        self._finish: Finish | None = None
        self._schedule_joins()

    def run(self) -> Course:
        while self._finish is None:
            self.step()
        course = self.course
        course.outcome, course.end_s, course.num_commits = self._finish.outcome, self._now_s, self.queue.num_committed
        course.ideal_end_s = self._ideal_end_s()
        ready_s = sum(-change * at_s for at_s, change in self._changes if at_s < self._all_given_out_at_s)
        present = sum(change for at_s, change in self._changes if at_s < self._all_given_out_at_s)
        ready_s += present * self._all_given_out_at_s
        course.idle_share = self._idle_s / ready_s if ready_s else 0.0
        return course

    def step(self) -> list[Command]:
        """The next thing that happens in the cluster, told to the queue, and its commands carried out."""
        wake_at_s = self.queue.wake_at_s
        if not self._coming or (wake_at_s is not None and wake_at_s < self._coming[0][0]):
            assert wake_at_s is not None, "nothing will ever happen again"
            self._now_s = max(self._now_s, wake_at_s)
            event: Event | None = Tick(self._now_s)
        else:
            self._now_s, _, event = heapq.heappop(self._coming)
            event = self._happens(event)
        if event is None:
            return []
        started_s = time.thread_time()
        commands = self.queue.handle(event)
        self.course.queue_s += time.thread_time() - started_s
        self.course.num_events += 1
        for command in commands:
            self._execute(command)
        return commands

    def _schedule_joins(self) -> None:
        cluster = self._cluster
        num_late = int(cluster.num_replicas * cluster.late_share)
        expected_s = cluster.num_units * cluster.unit_s / cluster.num_replicas / self._at_once
        joins = sorted(self._dice.uniform(0, expected_s / 2) for _ in range(num_late))
        self._at(0.0, ReplicasWanted(cluster.num_replicas - num_late, 0.0))
        for index, at_s in enumerate(joins, 1):
            self._at(at_s, ReplicasWanted(cluster.num_replicas - num_late + index, at_s))

    def _at(self, at_s: float, event: Event) -> None:
        self._order += 1
        heapq.heappush(self._coming, (at_s, self._order, event))

    def _happens(self, event: Event) -> Event | None:
        """What the event does to the cluster itself; None when its replica is gone by now."""
        match event:
            case ReplicaReady(replica_id=replica_id):
                self._replicas[replica_id] = _Replica([self._now_s] * self._at_once)
                self._idle_since_s[replica_id] = self._now_s
                self._changes.append((self._now_s, 1))
                if self._cluster.deaths_per_replica_hour:
                    lives_s = self._dice.expovariate(self._cluster.deaths_per_replica_hour / 3600)
                    self._at(self._now_s + lives_s, ReplicaDied(replica_id, "dice", self._now_s + lives_s))
                self._next_progress(replica_id)
            case ReplicaDied(replica_id=replica_id):
                replica = self._replicas.pop(replica_id, None)
                if replica is None:
                    return None
                self._changes.append((self._now_s, -1))
                self._end_idle(replica_id)
                self.course.num_deaths += 1
                self.course.num_units_redone += len(replica.held)
                self._returned_at_s.update(dict.fromkeys(replica.held, self._now_s))
                # What the dead one had begun is work, too.
                self._worked_s += sum(max(0.0, self._now_s - begun_s) for begun_s in replica.held.values())
            case ReplicaProgressed(replica_id=replica_id):
                if replica_id not in self._replicas:
                    return None
                self._next_progress(replica_id)
            case (
                UnitCommitted(replica_id=replica_id, unit_id=unit_id)
                | UnitProbed(replica_id=replica_id, unit_id=unit_id)
            ):
                replica = self._replicas.get(replica_id)
                if replica is None:
                    return None
                self._worked_s += self._now_s - replica.held.pop(unit_id)
                if not replica.held:
                    self._idle_since_s[replica_id] = self._now_s
        return event

    def _next_progress(self, replica_id: int) -> None:
        at_s = self._now_s + self._cluster.progress_interval_s
        self._replicas[replica_id].num_signs_of_life += 1
        self._at(at_s, ReplicaProgressed(replica_id, self._replicas[replica_id].num_signs_of_life, at_s))

    def _execute(self, command: Command) -> None:
        cluster, dice = self._cluster, self._dice
        match command:
            case StartReplica(replica_id=replica_id):
                ready_at_s = self._now_s + cluster.start_s * dice.uniform(0.5, 2.0)
                self._at(ready_at_s, ReplicaReady(replica_id, cluster.capacity, ready_at_s))
            case StopReplica(replica_id=replica_id):
                if self._replicas.pop(replica_id, None) is not None:
                    self._changes.append((self._now_s, -1))
                    self._end_idle(replica_id)
            case Assign(replica_id=replica_id, unit=unit) | Probe(replica_id=replica_id, unit=unit):
                replica, unit_id = self._replicas[replica_id], unit.unit_id
                self._end_idle(replica_id)
                begins_s = max(self._now_s, replica.free_at_s[0])
                share = len(command.offsets) / unit.num_rows if isinstance(command, Probe) else 1.0
                ends_s = begins_s + share * cluster.unit_s * dice.uniform(1 - cluster.jitter, 1 + cluster.jitter)
                heapq.heapreplace(replica.free_at_s, ends_s)
                replica.held[unit_id] = begins_s
                ends = UnitCommitted if isinstance(command, Assign) else UnitProbed
                self._at(ends_s, ends(replica_id, unit_id, ends_s))
                waited_s = self._now_s - self._returned_at_s.pop(unit_id, self._now_s)
                self.course.longest_wait_s = max(self.course.longest_wait_s, waited_s)
                if len(self._given_out) < cluster.num_units:
                    self._given_out.add(unit_id)
                    self._all_given_out_at_s = self._now_s
            case Finish():
                self._finish = command

    def _end_idle(self, replica_id: int) -> None:
        since_s = self._idle_since_s.pop(replica_id, None)
        if since_s is not None and len(self._given_out) < self._cluster.num_units:
            self._idle_s += self._now_s - since_s

    def _ideal_end_s(self) -> float:
        num_ready, at_s, left_s = 0, 0.0, self._worked_s / self._at_once
        for change_at_s, change in self._changes:
            if left_s <= num_ready * (change_at_s - at_s):
                break
            left_s -= num_ready * (change_at_s - at_s)
            at_s, num_ready = change_at_s, num_ready + change
        return at_s + left_s / num_ready if num_ready else at_s
