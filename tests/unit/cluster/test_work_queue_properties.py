"""Every order of events hypothesis can think of: duplicates, lost answers, deaths, hangs, evictions, drains."""

import random
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchinfer.cluster.queue_messages import (
    Assign,
    Command,
    Drain,
    DrainReplica,
    Event,
    Finish,
    Probe,
    ReplicaDied,
    ReplicaDrained,
    ReplicaEvicted,
    ReplicaProgressed,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicasWanted,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitFailed,
    UnitProbed,
)
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.work_queue import WorkQueue
from batchinfer.records import WorkUnit

Call = Assign | Probe
#: Steps after which a cluster that does everything it is told must be through.
MAX_STEPS_TO_THE_END = 3000


class Cluster(RuleBasedStateMachine):
    """Replicas that do what the queue says, and die when they meet a poison row; nothing else here is to blame."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.state: dict[int, str] = {}
        self.calls: list[Call] = []
        self.finish: Finish | None = None
        self.repeatable: list[Event] = []
        self.committed: dict[str, tuple[int, ...]] = {}
        self.num_failures = 0
        self.drained = False

    @initialize(
        sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
        num_poisoned=st.integers(0, 3),
        capacity=st.integers(1, 60),
        max_attempts=st.integers(1, 4),
        seed=st.integers(0, 2**16),
    )
    def begin(self, sizes: list[int], num_poisoned: int, capacity: int, max_attempts: int, seed: int) -> None:
        dice = random.Random(seed)
        self.units = [WorkUnit(f"{index:016x}", 0, num_rows) for index, num_rows in enumerate(sizes)]
        rows = [(unit.unit_id, row) for unit in self.units for row in range(unit.num_rows)]
        self.poison = set(dice.sample(rows, min(num_poisoned, len(rows))))
        self.capacity = capacity
        self.policy = QueuePolicy(max_attempts=max_attempts)
        self.queue = WorkQueue(self.units, self.policy)
        self.send(ReplicasWanted(dice.randint(1, 4), self.now_s))

    # The model ----------------------------------------------------------------------------------------

    def send(self, event: Event) -> None:
        for command in self.queue.handle(event):
            assert self.finish is None, "a command after Finish"
            self.execute(command)
        self.queue.validate()

    def execute(self, command: Command) -> None:
        match command:
            case StartReplica(replica_id=replica_id):
                assert replica_id not in self.state, "an id is used twice"
                assert not self.drained, "a start while the job drains"
                self.state[replica_id] = "starting"
            case StopReplica(replica_id=replica_id):
                self.gone(replica_id)
            case DrainReplica(replica_id=replica_id):
                assert self.state[replica_id] == "ready"
                self.state[replica_id] = "draining"
            case Assign() | Probe():
                self.begin_call(command)
            case Finish():
                self.finish = command

    def begin_call(self, call: Call) -> None:
        unit_id = call.unit.unit_id
        assert not self.drained, "a unit is given out while the job drains"
        assert self.state[call.replica_id] == "ready"
        assert unit_id not in self.committed, "a committed unit is given out"
        assert all(call.lease > other.lease for other in self.calls), "leases do not count up"
        assert all(other.unit.unit_id != unit_id for other in self.calls), "a unit is held twice"
        beside = [other for other in self.calls if other.replica_id == call.replica_id]
        if isinstance(call, Probe):
            assert call.offsets, "a probe of nothing"
            assert range(call.unit.num_rows)[call.offsets.start : call.offsets.stop] == call.offsets
            assert not beside, "a probe has company"
        else:
            assert all(isinstance(other, Assign) for other in beside), "a probe gets company"
            self.check_poisoned(call)
        self.calls.append(call)

    def check_poisoned(self, call: Assign) -> None:
        assert {(call.unit.unit_id, row) for row in call.poisoned} <= self.poison, "an innocent row is convicted"

    def gone(self, replica_id: int) -> None:
        self.state.pop(replica_id, None)
        self.calls = [call for call in self.calls if call.replica_id != replica_id]

    def is_deadly(self, call: Call) -> bool:
        rows = set(range(call.unit.num_rows)) - set(call.poisoned) if isinstance(call, Assign) else call.offsets
        return any((call.unit.unit_id, row) in self.poison for row in rows)

    def answer(self, call: Call) -> None:
        """The replica comes to the end of the call, or to its own."""
        if self.is_deadly(call):
            self.gone(call.replica_id)
            event: Event = ReplicaDied(call.replica_id, "poison", self.now_s)
        else:
            self.calls.remove(call)
            if isinstance(call, Assign):
                self.committed[call.unit.unit_id] = call.poisoned
                event = UnitCommitted(call.replica_id, call.unit.unit_id, self.now_s)
            else:
                event = UnitProbed(call.replica_id, call.unit.unit_id, self.now_s, call.lease)
        self.repeatable.append(event)
        self.send(event)

    def pass_time(self, until_s: float) -> None:
        """Ticks at the moments that the queue asks for, as the driver sends them."""
        while self.finish is None and (wake_at_s := self.queue.wake_at_s) is not None and wake_at_s <= until_s:
            self.now_s = max(self.now_s, wake_at_s)
            self.send(Tick(self.now_s))
            after_s = self.queue.wake_at_s
            assert after_s is None or after_s > self.now_s, "the driver would tick for ever"
        self.now_s = max(self.now_s, until_s)

    def in_state(self, *states: str) -> list[int]:
        return sorted(replica_id for replica_id, state in self.state.items() if state in states)

    # What may happen ----------------------------------------------------------------------------------

    def some(self, states: tuple[str, ...], pick: int, then: Callable[[int], None]) -> None:
        replicas = self.in_state(*states)
        if replicas and self.finish is None:
            then(replicas[pick % len(replicas)])

    @rule(num_replicas=st.integers(0, 5))
    def the_cluster_changes(self, num_replicas: int) -> None:
        self.send(ReplicasWanted(num_replicas, self.now_s))

    @rule(pick=st.integers(0, 9))
    def a_replica_becomes_ready(self, pick: int) -> None:
        self.some(("starting",), pick, self.become_ready)

    def become_ready(self, replica_id: int) -> None:
        self.state[replica_id] = "ready"
        event = ReplicaReady(replica_id, self.capacity, self.now_s)
        self.repeatable.append(event)
        self.send(event)

    @rule(pick=st.integers(0, 99))
    def a_call_is_answered(self, pick: int) -> None:
        if self.calls and self.finish is None:
            self.answer(self.calls[pick % len(self.calls)])

    @rule(pick=st.integers(0, 99))
    def a_call_is_answered_too(self, pick: int) -> None:
        """Twice as likely as any trouble."""
        self.a_call_is_answered(pick)

    @rule(pick=st.integers(0, 99))
    def storage_fails_a_call(self, pick: int) -> None:
        if self.calls and self.finish is None:
            call = self.calls.pop(pick % len(self.calls))
            self.num_failures += 1
            self.send(UnitFailed(call.replica_id, call.unit.unit_id, "storage", self.now_s))

    @rule(pick=st.integers(0, 9))
    def a_node_goes(self, pick: int) -> None:
        self.some(("starting", "ready", "draining"), pick, self.lose)

    def lose(self, replica_id: int) -> None:
        self.gone(replica_id)
        event = ReplicaDied(replica_id, "its node went", self.now_s, blameless=True)
        self.repeatable.append(event)
        self.send(event)

    @rule(pick=st.integers(0, 9))
    def a_node_is_about_to_go(self, pick: int) -> None:
        self.some(("starting", "ready", "draining"), pick, self.evict)

    def evict(self, replica_id: int) -> None:
        event = ReplicaEvicted(replica_id, self.now_s)
        self.repeatable.append(event)
        self.send(event)
        assert self.finish is not None or self.state.get(replica_id, "draining") == "draining"

    @rule(pick=st.integers(0, 9))
    def a_replica_has_drained(self, pick: int) -> None:
        self.some(("draining",), pick, self.end_drain)

    def end_drain(self, replica_id: int) -> None:
        event = ReplicaDrained(replica_id, self.now_s)
        self.repeatable.append(event)
        self.send(event)
        assert replica_id not in self.state, "a drained replica is left running"

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        """Every replica tells that it lives, so that only those that start or drain can run out of time."""
        for replica_id in self.in_state("ready"):
            self.send(ReplicaProgressed(replica_id, round(self.now_s * 1000), self.now_s))
        self.pass_time(self.now_s + seconds)

    @rule(pick=st.integers(0, 99))
    def a_deadly_call_hangs_its_replica(self, pick: int) -> None:
        deadly = [call for call in self.calls if self.is_deadly(call) and self.state[call.replica_id] == "ready"]
        if deadly and self.finish is None:
            hung = deadly[pick % len(deadly)].replica_id
            for _ in range(3):
                for replica_id in self.in_state("ready"):
                    if replica_id != hung:
                        self.send(ReplicaProgressed(replica_id, round(self.now_s * 1000), self.now_s))
                self.pass_time(self.now_s + self.policy.hang_timeout_s / 2)
            assert hung not in self.state, "a silent replica lives on"

    @rule(pick=st.integers(0, 999))
    def something_is_told_again(self, pick: int) -> None:
        if self.repeatable:
            self.send(self.repeatable[pick % len(self.repeatable)])

    @rule(replica_id=st.integers(1000, 1003), unit_id=st.sampled_from(["never-heard-of", f"{0:016x}-{0:09d}-1"]))
    def a_stranger_speaks(self, replica_id: int, unit_id: str) -> None:
        for event in (
            ReplicaReady(replica_id, 1, self.now_s),
            ReplicaDied(replica_id, "", self.now_s),
            ReplicaDrained(replica_id, self.now_s),
            ReplicaEvicted(replica_id, self.now_s),
            ReplicaProgressed(replica_id, 1, self.now_s),
            UnitCommitted(replica_id, unit_id, self.now_s),
            UnitProbed(replica_id, unit_id, self.now_s),
            UnitFailed(replica_id, unit_id, "", self.now_s),
        ):
            self.send(event)

    @precondition(lambda self: self.now_s > 60)
    @rule()
    def the_job_is_stopped(self) -> None:
        self.send(Drain(self.now_s))
        self.drained = True
        assert self.finish is not None or self.in_state("draining") == sorted(self.state)

    @invariant()
    def counts_agree(self) -> None:
        queue = self.queue
        num_open = queue.num_pending + queue.num_leased
        assert queue.num_committed + len(queue.given_up) + num_open == len(self.units)
        assert queue.num_committed == len(self.committed)
        assert (self.finish is not None) == queue.finished

    # And how it must end --------------------------------------------------------------------------------

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.go_on_to_the_end()
            self.check_end()

    def go_on_to_the_end(self) -> None:
        """From here on everybody does as told."""
        self.send(ReplicasWanted(2, self.now_s))
        for _ in range(MAX_STEPS_TO_THE_END):
            if self.finish is not None:
                return
            if starting := self.in_state("starting"):
                self.become_ready(starting[0])
            elif draining := self.in_state("draining"):
                self.end_drain(draining[0])
            elif self.calls:
                self.answer(self.calls[0])
            else:
                assert self.queue.wake_at_s is not None, "nothing will ever happen again"
                self.pass_time(max(self.now_s, self.queue.wake_at_s))
        raise AssertionError("the run never ended")

    def check_end(self) -> None:
        assert self.finish is not None
        assert not self.state, "a replica was left running"
        expected = {"done"} | ({"drained"} if self.drained else set()) | ({"given_up"} if self.num_failures else set())
        assert self.finish.outcome in expected, self.finish
        if self.finish.outcome == "done":
            assert len(self.committed) == len(self.units)
        if self.finish.outcome != "drained":
            assert not self.queue.num_pending
        for unit_id, poisoned in self.committed.items():
            assert {(unit_id, row) for row in poisoned} == {place for place in self.poison if place[0] == unit_id}


class SickCluster(Cluster):
    """Beside all that: replicas die for nothing, cannot start, fall silent and lose answers."""

    def check_poisoned(self, call: Assign) -> None:
        """Two deaths for nothing in a row on one row convict an innocent one; only good machines tell."""

    @rule(pick=st.integers(0, 9))
    def a_replica_dies_for_nothing(self, pick: int) -> None:
        self.some(("starting", "ready", "draining"), pick, self.die)

    def die(self, replica_id: int) -> None:
        self.gone(replica_id)
        self.send(ReplicaDied(replica_id, "for nothing", self.now_s))

    @rule(pick=st.integers(0, 9), final=st.sampled_from([False] * 9 + [True]))
    def a_start_fails(self, pick: int, final: bool) -> None:
        self.some(("starting",), pick, lambda replica_id: self.fail_start(replica_id, final))

    def fail_start(self, replica_id: int, final: bool) -> None:
        self.gone(replica_id)
        self.send(ReplicaStartFailed(replica_id, "no memory", final, self.now_s))

    @rule(seconds=st.floats(0, 5000))
    def all_are_silent(self, seconds: float) -> None:
        self.pass_time(self.now_s + seconds)

    @rule(pick=st.integers(0, 999))
    def a_late_failure_arrives(self, pick: int) -> None:
        if self.calls:
            call = self.calls[pick % len(self.calls)]
            self.send(UnitFailed(call.replica_id + 1, call.unit.unit_id, "late", self.now_s))

    def check_end(self) -> None:
        assert self.finish is not None
        assert not self.state, "a replica was left running"
        if self.finish.outcome in ("done", "given_up"):
            assert not self.queue.num_pending
            assert (self.finish.outcome == "given_up") == bool(self.queue.given_up)


SETTINGS = settings(stateful_step_count=60)
TestCluster = Cluster.TestCase
TestCluster.settings = SETTINGS
TestSickCluster = SickCluster.TestCase
TestSickCluster.settings = SETTINGS
