"""The state machine: named scenarios first, then every order of events hypothesis can think of."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cluster.work_queue import (
    Assign,
    Command,
    Event,
    Finish,
    QueuePolicy,
    ReplicaDied,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicasWanted,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitFailed,
    WorkQueue,
)
from batchinfer.records import WorkUnit


def units(count: int, num_rows: int = 10) -> list[WorkUnit]:
    return [WorkUnit("shard", index * num_rows, num_rows) for index in range(count)]


class Driver:
    """Feeds events, keeps what was commanded, checks the invariants after each."""

    def __init__(self, count: int, policy: QueuePolicy | None = None, num_rows: int = 10) -> None:
        self.queue = WorkQueue(units(count, num_rows), policy or QueuePolicy())
        self.at_s = 0.0

    def send(self, event: Event) -> list[Command]:
        commands = self.queue.handle(event)
        self.queue.validate()
        return commands

    def wanted(self, num_replicas: int) -> list[Command]:
        return self.send(ReplicasWanted(num_replicas, self.at_s))

    def ready(self, replica_id: int, capacity: int = 1) -> list[Command]:
        return self.send(ReplicaReady(replica_id, capacity, self.at_s))

    def died(self, replica_id: int) -> list[Command]:
        return self.send(ReplicaDied(replica_id, "killed", self.at_s))

    def committed(self, assign: Assign) -> list[Command]:
        return self.send(UnitCommitted(assign.replica_id, assign.unit.unit_id, self.at_s))

    def failed(self, assign: Assign) -> list[Command]:
        return self.send(UnitFailed(assign.replica_id, assign.unit.unit_id, "storage", self.at_s))


def assigns(commands: list[Command]) -> list[Assign]:
    return [command for command in commands if isinstance(command, Assign)]


def test_a_ready_replica_holds_two_units_and_gets_the_next_when_one_commits() -> None:
    driver = Driver(4)
    assert driver.wanted(1) == [StartReplica(0)]
    first, second = assigns(driver.ready(0))
    assert [first.unit.first_row, second.unit.first_row] == [0, 10]
    (third,) = assigns(driver.committed(first))
    assert third.unit.first_row == 20


def test_the_last_commit_stops_the_replicas_and_finishes_once() -> None:
    driver = Driver(1)
    driver.wanted(1)
    (only,) = assigns(driver.ready(0))
    assert driver.committed(only) == [StopReplica(0), Finish("done")]
    assert driver.committed(only) == []
    assert driver.queue.finished


def test_no_units_finish_at_once() -> None:
    assert Driver(0).wanted(3) == [Finish("done")]


def test_never_more_replicas_than_units() -> None:
    assert len(Driver(3).wanted(8)) == 3


def test_small_units_are_held_until_twice_the_capacity_is_submitted() -> None:
    driver = Driver(100, num_rows=10)
    driver.wanted(1)
    assert len(assigns(driver.ready(0, capacity=40))) == 8


def test_samples_count_towards_capacity() -> None:
    driver = Driver(100, QueuePolicy(samples_per_row=4), num_rows=10)
    driver.wanted(1)
    assert len(assigns(driver.ready(0, capacity=40))) == 2


def test_the_first_ready_replica_leaves_their_share_to_those_still_starting() -> None:
    driver = Driver(16)
    driver.wanted(4)
    assert len(assigns(driver.ready(0, capacity=1000))) == 4


def test_units_of_a_dead_replica_come_back_one_at_a_time_and_alone() -> None:
    """1. a replica with two units dies  2. its replacement gets one of them and nothing else  3. then the other."""
    driver = Driver(5)
    driver.wanted(1)
    first, second = assigns(driver.ready(0))
    assert driver.died(0) == [StartReplica(1)]
    (again,) = assigns(driver.ready(1))
    assert again.unit == first.unit
    (other,) = assigns(driver.committed(again))
    assert other.unit == second.unit
    assert len(assigns(driver.committed(other))) == 2


def test_a_unit_that_kills_every_replica_is_given_up_and_its_neighbours_are_not() -> None:
    """The death in company charges nobody; three deaths alone use up the three attempts."""
    driver = Driver(2)
    driver.wanted(1)
    poison, neighbour = assigns(driver.ready(0))
    started = [command.replica_id for command in driver.died(0) if isinstance(command, StartReplica)]
    num_deaths_alone = 0
    while not driver.queue.finished:
        work = assigns(driver.ready(started[-1]))
        while work:
            (assign,) = work
            if assign.unit == neighbour.unit:
                work = assigns(driver.committed(assign))
                continue
            num_deaths_alone += 1
            work = []
            started += [c.replica_id for c in driver.died(assign.replica_id) if isinstance(c, StartReplica)]
    assert num_deaths_alone == 3
    assert [given_up.unit for given_up in driver.queue.given_up] == [poison.unit]
    assert driver.queue.num_committed == 1


def test_with_no_replacement_in_sight_a_busy_replica_runs_dry_for_the_suspect() -> None:
    driver = Driver(20)
    driver.wanted(2)
    held = {0: assigns(driver.ready(0)), 1: assigns(driver.ready(1))}
    driver.wanted(1)
    driver.died(0)
    first, second = held[1]
    assert assigns(driver.committed(first)) == []
    (suspect,) = assigns(driver.committed(second))
    assert suspect.unit in {assign.unit for assign in held[0]}


def test_a_failed_unit_waits_for_its_backoff_and_counts_its_attempts() -> None:
    driver = Driver(1, QueuePolicy(backoff_s=5.0))
    driver.wanted(1)
    (first,) = assigns(driver.ready(0))
    assert driver.failed(first) == []
    assert driver.queue.wake_at_s == 5.0
    assert assigns(driver.send(Tick(4.9))) == []
    (second,) = assigns(driver.send(Tick(5.0)))
    assert (first.attempt, second.attempt) == (1, 2)


def test_a_unit_that_fails_on_every_attempt_is_given_up_and_the_rest_goes_on() -> None:
    driver = Driver(2)
    driver.wanted(1)
    bad, good = assigns(driver.ready(0))
    driver.committed(good)
    assign = bad
    for _ in range(2):
        driver.failed(assign)
        driver.at_s += 100
        (assign,) = assigns(driver.send(Tick(driver.at_s)))
    assert driver.failed(assign) == [StopReplica(0), Finish("given_up")]
    (given_up,) = driver.queue.given_up
    assert (given_up.unit, given_up.num_attempts, given_up.error) == (bad.unit, 3, "storage")


def test_a_final_start_failure_ends_the_job_at_once() -> None:
    driver = Driver(2)
    driver.wanted(2)
    commands = driver.send(ReplicaStartFailed(0, "no config.json", True, 0.0))
    assert commands == [StopReplica(1), Finish("job_error", "no config.json")]


def test_start_failures_are_tried_again_with_backoff_and_then_said_once() -> None:
    driver = Driver(1)
    driver.wanted(1)
    for replica_id in range(2):
        assert driver.send(ReplicaStartFailed(replica_id, "CUDA busy", False, driver.at_s)) == []
        assert driver.queue.wake_at_s is not None
        driver.at_s = driver.queue.wake_at_s
        assert driver.send(Tick(driver.at_s)) == [StartReplica(replica_id + 1)]
    assert driver.died(2) == [Finish("cannot_start", "killed")]


def test_a_grown_cluster_gets_more_replicas_and_a_shrunk_one_loses_those_still_starting() -> None:
    driver = Driver(100)
    assert driver.wanted(1) == [StartReplica(0)]
    driver.ready(0)
    assert driver.wanted(3) == [StartReplica(1), StartReplica(2)]
    assert driver.wanted(2) == [StopReplica(1)]


def test_endless_deaths_without_a_commit_end_the_run() -> None:
    driver = Driver(1000)
    driver.wanted(1)
    replica_id = 0
    while not driver.queue.finished:
        driver.ready(replica_id)
        commands = driver.died(replica_id)
        replica_id += 1
        assert replica_id < 100
    assert isinstance(commands[-1], Finish)
    assert commands[-1].outcome == "replicas_keep_dying"


def test_messages_of_gone_replicas_change_nothing() -> None:
    driver = Driver(4)
    driver.wanted(1)
    first, _ = assigns(driver.ready(0))
    driver.died(0)
    before = (driver.queue.num_pending, driver.queue.num_leased)
    for event in (
        UnitCommitted(0, first.unit.unit_id, 0.0),
        UnitFailed(0, first.unit.unit_id, "late", 0.0),
        ReplicaDied(0, "again", 0.0),
        ReplicaReady(0, 5, 0.0),
        ReplicaStartFailed(0, "late", True, 0.0),
        UnitCommitted(1, "never heard of", 0.0),
    ):
        assert driver.send(event) == []
    assert (driver.queue.num_pending, driver.queue.num_leased) == before


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_units=st.integers(0, 30),
    num_replicas=st.integers(1, 6),
    capacity=st.integers(1, 100),
    trouble=st.floats(0, 0.6),
)
def test_whatever_happens_every_unit_ends_committed_or_given_up(
    seed: int, num_units: int, num_replicas: int, capacity: int, trouble: float
) -> None:
    """A cluster played by dice: replicas start, die, fail, answer twice and out of order; the sizes change."""
    dice = random.Random(seed)
    driver = Driver(num_units)
    alive: set[int] = set()
    held: dict[int, list[Assign]] = {}
    attempts: Counter[str] = Counter()
    finish: Finish | None = None
    sent: list[Event] = []

    def execute(commands: list[Command]) -> None:
        nonlocal finish
        for command in commands:
            assert finish is None, "a command after Finish"
            match command:
                case StartReplica(replica_id=replica_id):
                    assert replica_id not in alive
                    alive.add(replica_id)
                case StopReplica(replica_id=replica_id):
                    alive.discard(replica_id)
                    held.pop(replica_id, None)
                case Assign():
                    assert command.replica_id in alive
                    held[command.replica_id].append(command)
                    attempts[command.unit.unit_id] += 1
                case Finish():
                    finish = command

    def send(event: Event) -> None:
        sent.append(event)
        execute(driver.send(event))

    send(ReplicasWanted(num_replicas, 0.0))
    for _ in range(3000):
        if finish is not None:
            break
        driver.at_s += dice.random()
        if dice.random() < 0.05:
            send(ReplicasWanted(dice.randint(1, num_replicas), driver.at_s))
        if dice.random() < 0.1:
            execute(driver.send(dice.choice(sent)))  # a duplicate of something that happened
        wake_at_s = driver.queue.wake_at_s
        if not alive and wake_at_s is not None:
            driver.at_s = max(driver.at_s, wake_at_s)
        send(Tick(driver.at_s))
        if not alive or finish is not None:
            continue
        replica_id = dice.choice(sorted(alive))
        if dice.random() < trouble * 0.3:
            alive.discard(replica_id)
            held.pop(replica_id, None)
            send(ReplicaDied(replica_id, "dice", driver.at_s))
        elif replica_id not in held:
            if dice.random() < trouble * 0.3:
                alive.discard(replica_id)
                send(ReplicaStartFailed(replica_id, "dice", False, driver.at_s))
            else:
                held[replica_id] = []
                send(ReplicaReady(replica_id, capacity, driver.at_s))
        elif held[replica_id]:
            assign = held[replica_id].pop(dice.randrange(len(held[replica_id])))
            if dice.random() < trouble * 0.5:
                send(UnitFailed(replica_id, assign.unit.unit_id, "dice", driver.at_s))
            else:
                send(UnitCommitted(replica_id, assign.unit.unit_id, driver.at_s))
    assert finish is not None, "the run never ended"
    assert not alive, "a replica was left running"
    if finish.outcome in ("done", "given_up"):
        assert driver.queue.num_committed + len(driver.queue.given_up) == num_units
        assert (finish.outcome == "given_up") == bool(driver.queue.given_up)
        assert set(attempts) == {unit.unit_id for unit in units(num_units)}
    assert all(given_up.num_attempts == 3 for given_up in driver.queue.given_up)


def test_backoff_doubles_up_to_its_bound() -> None:
    policy = QueuePolicy(backoff_s=1.0, max_backoff_s=5.0)
    assert [policy.backoff_after(k) for k in (1, 2, 3, 4)] == pytest.approx([1.0, 2.0, 4.0, 5.0])
