"""The state machine in named scenarios; test_work_queue_properties.py tries the other orders of events."""

import math

import pytest

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


def units(count: int, num_rows: int = 10) -> list[WorkUnit]:
    return [WorkUnit("shard", index * num_rows, num_rows) for index in range(count)]


class Driver:
    """Feeds events, keeps what was commanded, checks the invariants after each."""

    def __init__(self, count: int, policy: QueuePolicy | None = None, num_rows: int = 10) -> None:
        self.queue = WorkQueue(units(count, num_rows), policy or QueuePolicy())
        self.at_s = 0.0
        #: Every unit ever assigned, in order.
        self.given: list[Assign] = []

    def send(self, event: Event) -> list[Command]:
        commands = self.queue.handle(event)
        self.queue.validate()
        self.given += [command for command in commands if isinstance(command, Assign)]
        return commands

    def wanted(self, num_replicas: int) -> list[Command]:
        return self.send(ReplicasWanted(num_replicas, self.at_s))

    def ready(self, replica_id: int, capacity: int = 1) -> list[Command]:
        return self.send(ReplicaReady(replica_id, capacity, self.at_s))

    def died(self, replica_id: int, *, blameless: bool = False) -> list[Command]:
        return self.send(ReplicaDied(replica_id, "killed", self.at_s, blameless))

    def tick(self, at_s: float) -> list[Command]:
        self.at_s = at_s
        return self.send(Tick(at_s))

    def committed(self, assign: Assign) -> list[Command]:
        return self.send(UnitCommitted(assign.replica_id, assign.unit.unit_id, self.at_s))

    def failed(self, call: Assign | Probe) -> list[Command]:
        return self.send(UnitFailed(call.replica_id, call.unit.unit_id, "storage", self.at_s))

    def probed(self, probe: Probe) -> list[Command]:
        return self.send(UnitProbed(probe.replica_id, probe.unit.unit_id, self.at_s, probe.lease))


class Job(Driver):
    """A cluster of one kind of trouble: a replica dies when it comes to a poison row. Everything else works."""

    def __init__(
        self,
        count: int,
        poison: set[tuple[int, int]],
        *,
        num_replicas: int = 1,
        num_rows: int = 16,
        policy: QueuePolicy | None = None,
    ) -> None:
        """``poison`` names rows by the unit's place and the offset within it."""
        super().__init__(count, policy, num_rows)
        self.poison = {(units(count, num_rows)[index].unit_id, offset) for index, offset in poison}
        self.num_replicas = num_replicas
        self.num_deaths = 0
        self.probes: list[Probe] = []
        #: What each committed unit was committed without.
        self.poisoned: dict[int, tuple[int, ...]] = {}
        self.finish: Finish | None = None

    def run(self, *, max_deaths: int = 1000) -> Finish:
        """To the end; a replica's calls are answered in the order in which they were given."""
        todo: list[Command] = self.wanted(self.num_replicas)
        while self.finish is None:
            if not todo:
                assert self.queue.wake_at_s is not None, "nothing will ever happen again"
                todo += self.tick(self.queue.wake_at_s)
                continue
            command = todo.pop(0)
            match command:
                case StartReplica(replica_id=replica_id):
                    todo += self.ready(replica_id)
                case Assign() | Probe() if self.is_deadly(command):
                    self.num_deaths += 1
                    assert self.num_deaths <= max_deaths
                    gone = command.replica_id
                    todo = [it for it in todo if isinstance(it, Finish) or it.replica_id != gone]
                    todo += self.died(gone)
                case Assign():
                    self.poisoned[command.unit.first_row // command.unit.num_rows] = command.poisoned
                    todo += self.committed(command)
                case Probe():
                    self.probes.append(command)
                    todo += self.probed(command)
                case Finish():
                    self.finish = command
        return self.finish

    def is_deadly(self, call: Assign | Probe) -> bool:
        rows = set(range(call.unit.num_rows)) - set(call.poisoned) if isinstance(call, Assign) else call.offsets
        return any((call.unit.unit_id, row) in self.poison for row in rows)


def probes(commands: list[Command]) -> list[Probe]:
    return [command for command in commands if isinstance(command, Probe)]


def starts(commands: list[Command]) -> list[int]:
    return [command.replica_id for command in commands if isinstance(command, StartReplica)]


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


def test_backoff_doubles_up_to_its_bound() -> None:
    policy = QueuePolicy(backoff_s=1.0, max_backoff_s=5.0)
    assert [policy.backoff_after(k) for k in (1, 2, 3, 4)] == pytest.approx([1.0, 2.0, 4.0, 5.0])
    assert policy.backoff_after(5000) == 5.0


# Poison rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(16))
def test_a_poison_row_is_found_wherever_it_is_and_its_neighbours_are_generated(offset: int) -> None:
    job = Job(5, {(2, offset)})
    assert job.run().outcome == "done"
    assert job.poisoned == {0: (), 1: (), 2: (offset,), 3: (), 4: ()}
    # In company and alone as a whole, then at most one for each halving, and a second one for the row itself.
    assert job.num_deaths <= 2 + math.ceil(math.log2(16)) + 1


def test_deaths_per_poison_row_grow_with_the_logarithm_of_the_rows() -> None:
    for num_rows in (1, 2, 3, 100, 1024, 5000):
        worst = 0
        for offset in {0, num_rows // 3, num_rows // 2, num_rows - 1}:
            job = Job(1, {(0, offset)}, num_rows=num_rows)
            assert job.run().outcome == "done"
            assert job.poisoned == {0: (offset,)}
            worst = max(worst, job.num_deaths)
        assert worst <= math.ceil(math.log2(num_rows)) + 2


@pytest.mark.parametrize(
    "poison",
    [
        {(0, 0), (0, 15)},
        {(0, 0), (0, 1), (0, 2)},
        {(0, 3), (1, 3), (4, 15)},
        {(0, offset) for offset in range(8)},
        {(index, 7) for index in range(5)},
    ],
    ids=["first and last", "neighbours", "three units", "half a unit", "every unit"],
)
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_several_poison_rows_are_found_exactly(poison: set[tuple[int, int]], num_replicas: int) -> None:
    job = Job(5, poison, num_replicas=num_replicas)
    assert job.run().outcome == "done"
    assert {(index, offset) for index, offsets in job.poisoned.items() for offset in offsets} == poison


def test_a_unit_of_one_row_that_kills_twice_alone_is_committed_without_it() -> None:
    """The death of the whole unit was the row's first one alone."""
    job = Job(1, {(0, 0)}, num_rows=1)
    assert job.run().outcome == "done"
    assert (job.poisoned, job.num_deaths) == ({0: (0,)}, 2)


def bisecting(count: int = 1, num_rows: int = 8, policy: QueuePolicy | None = None) -> tuple[Driver, Probe]:
    """A driver whose first unit has died alone, and the first probe of it."""
    driver = Driver(count, policy, num_rows)
    driver.wanted(1)
    held = assigns(driver.ready(0))
    for assign in held[1:]:
        driver.committed(assign)
    (probe,) = probes(driver.ready(starts(driver.died(0))[0]))
    assert probe.unit == held[0].unit
    return driver, probe


def test_when_one_half_survives_the_other_is_halved_without_a_death() -> None:
    driver, probe = bisecting()
    assert probe.offsets == range(4)
    (second,) = probes(driver.probed(probe))
    assert second.offsets == range(4, 6)
    assert second.lease > probe.lease


def test_a_unit_that_survives_all_probes_goes_out_whole_again_and_commits() -> None:
    driver, probe = bisecting()
    tried: list[int] = []
    commands: list[Command] = [probe]
    while found := probes(commands):
        tried += found[0].offsets
        commands = driver.probed(found[0])
    assert sorted(tried) == list(range(8))
    (whole,) = assigns(commands)
    assert (whole.poisoned, whole.attempt) == ((), 2)
    assert driver.committed(whole)[-1] == Finish("done")


@pytest.mark.parametrize("max_attempts", [1, 2, 3, 5])
def test_a_unit_that_kills_only_as_a_whole_is_given_up_after_its_attempts(max_attempts: int) -> None:
    driver, probe = bisecting(policy=QueuePolicy(max_attempts=max_attempts))
    num_deaths = 1
    commands: list[Command] = [probe]
    while not driver.queue.finished:
        if found := probes(commands):
            commands = driver.probed(found[0])
        else:
            (whole,) = assigns(commands)
            commands = driver.died(whole.replica_id)
            num_deaths += 1
            if new := starts(commands):
                commands = driver.ready(new[0])
    assert isinstance(commands[-1], Finish)
    assert commands[-1].outcome == "given_up"
    assert num_deaths == driver.queue.given_up[0].num_attempts == max(2, max_attempts)


def test_a_blameless_death_during_a_probe_does_not_count() -> None:
    driver, probe = bisecting()
    for _ in range(50):
        (again,) = probes(driver.ready(starts(driver.died(probe.replica_id, blameless=True))[0]))
        assert again.offsets == probe.offsets
        probe = again
    assert not driver.queue.finished


def test_a_probe_that_storage_fails_is_tried_again_after_its_backoff_and_bounded() -> None:
    driver, probe = bisecting(policy=QueuePolicy(max_attempts=3, backoff_s=5.0))
    assert driver.failed(probe) == []
    assert driver.tick(4.9) == []
    (again,) = probes(driver.tick(5.0))
    assert (again.offsets, again.attempt) == (probe.offsets, 3)
    # A success in between shows that storage works again.
    (probe,) = probes(driver.probed(again))
    for _ in range(2):
        driver.failed(probe)
        (probe,) = probes(driver.tick(driver.at_s + 100))
    assert driver.failed(probe)[-1] == Finish("given_up")


def test_a_repeated_answer_does_not_pass_for_the_next_probes() -> None:
    driver, probe = bisecting()
    (second,) = probes(driver.probed(probe))
    assert driver.probed(probe) == []
    assert probes(driver.probed(second)) != []


def test_a_probe_waits_for_a_replica_that_has_finished_something() -> None:
    """1. the unit dies alone  2. the fresh replica gets one other unit, no more  3. when it is through, the probe."""
    driver = Driver(6)
    driver.wanted(1)
    first, second = assigns(driver.ready(0))
    (alone,) = assigns(driver.ready(starts(driver.died(0))[0]))
    assert alone.unit == first.unit
    (suspect,) = assigns(driver.ready(starts(driver.died(alone.replica_id))[0]))
    assert suspect.unit == second.unit
    # Its replica is proven now.
    (probe,) = probes(driver.committed(suspect))
    fresh = starts(driver.died(probe.replica_id))[0]
    (proof,) = driver.ready(fresh)
    assert isinstance(proof, Assign)
    assert proof.unit not in (first.unit, second.unit)
    (next_probe,) = driver.committed(proof)
    assert isinstance(next_probe, Probe)
    assert next_probe.unit == first.unit


def test_on_a_device_that_kills_everything_no_row_is_convicted() -> None:
    job = Job(100, {(index, row) for index in range(100) for row in range(2)}, num_rows=2)
    assert job.run(max_deaths=11).outcome == "replicas_keep_dying"
    assert not job.probes


def test_a_unit_of_which_nothing_survives_is_given_up_and_the_others_commit() -> None:
    """Each of its rows would cost three replicas."""
    job = Job(5, {(1, row) for row in range(1024)}, num_rows=1024)
    assert job.run(max_deaths=40).outcome == "given_up"
    assert sorted(job.poisoned) == [0, 2, 3, 4]
    assert "32 tries" in job.queue.given_up[0].error


def test_poison_rows_here_and_there_are_no_reason_to_end_the_run() -> None:
    """Many more deaths than the limit, but never without a success in between."""
    job = Job(300, {(index, index % 64) for index in range(0, 300, 10)}, num_rows=64, num_replicas=2)
    assert job.run().outcome == "done"
    assert job.num_deaths > 100


# Silence -----------------------------------------------------------------------------------------------


def progressed(driver: Driver, replica_id: int, num_signs_of_life: int) -> list[Command]:
    return driver.send(ReplicaProgressed(replica_id, num_signs_of_life, driver.at_s))


def test_a_replica_that_shows_no_sign_of_life_is_ended_and_its_units_are_suspects() -> None:
    driver = Driver(6, QueuePolicy(hang_timeout_s=100))
    driver.wanted(1)
    held = assigns(driver.ready(0))
    driver.tick(60.0)
    progressed(driver, 0, 1)
    driver.tick(150.0)
    assert progressed(driver, 0, 1) == [], "the same counter again is no sign of life"
    assert driver.tick(159.9) == []
    stop, start = driver.tick(160.0)
    assert stop == StopReplica(0, "no sign of life for 100 s while it held 2 unit(s)")
    assert start == StartReplica(1)
    assert [assign.unit for assign in assigns(driver.ready(1))] == [held[0].unit]


def test_a_commit_is_a_sign_of_life() -> None:
    driver = Driver(6, QueuePolicy(hang_timeout_s=100))
    driver.wanted(1)
    first, _ = assigns(driver.ready(0))
    driver.tick(90.0)
    driver.committed(first)
    assert driver.tick(189.9) == []
    assert driver.tick(190.0) != []


def test_a_replica_without_units_cannot_hang() -> None:
    driver = Driver(2, QueuePolicy(hang_timeout_s=100, start_timeout_s=1e9))
    driver.wanted(2)
    (first,) = assigns(driver.ready(0))
    driver.ready(1)
    driver.committed(first)
    # Replica 0 is idle; only replica 1 hangs.
    assert [command for command in driver.tick(1000.0) if isinstance(command, StopReplica)] == [
        StopReplica(1, "no sign of life for 100 s while it held 1 unit(s)")
    ]


def test_a_poison_row_may_hang_its_replica_instead_of_killing_it() -> None:
    driver, probe = bisecting(num_rows=2, policy=QueuePolicy(hang_timeout_s=100))
    _, start = driver.tick(100.0)
    assert isinstance(start, StartReplica)
    (sibling,) = probes(driver.ready(start.replica_id))
    (again,) = probes(driver.probed(sibling))
    assert again.offsets == probe.offsets == range(1)
    _, start = driver.tick(200.0)
    assert isinstance(start, StartReplica)
    (whole,) = assigns(driver.ready(start.replica_id))
    assert whole.poisoned == (0,)


def test_a_replica_that_does_not_become_ready_is_a_failed_start() -> None:
    driver = Driver(4, QueuePolicy(start_timeout_s=50, max_start_attempts=2, backoff_s=1))
    driver.wanted(1)
    assert driver.queue.wake_at_s == 50
    assert driver.tick(50.0) == [StopReplica(0, "not ready 50 s after its start")]
    assert driver.tick(51.0) == [StartReplica(1)]
    *_, finish = driver.tick(101.0)
    assert finish == Finish("cannot_start", "not ready 50 s after its start")


# Drain and eviction ------------------------------------------------------------------------------------


def test_draining_begins_nothing_and_ends_when_every_replica_has_drained() -> None:
    driver = Driver(10)
    driver.wanted(3)
    first, _ = assigns(driver.ready(0))
    driver.ready(1)
    assert driver.send(Drain(0.0)) == [DrainReplica(0), DrainReplica(1), StopReplica(2)]
    assert driver.send(Drain(0.0)) == []
    assert driver.committed(first) == []
    assert driver.wanted(5) == []
    assert driver.send(ReplicaDrained(0, 0.0)) == [StopReplica(0)]
    assert driver.died(1) == [Finish("drained")]
    assert (driver.queue.num_committed, driver.queue.num_pending) == (1, 9)


def test_a_replica_that_does_not_drain_is_not_waited_for() -> None:
    driver = Driver(10, QueuePolicy(drain_timeout_s=8))
    driver.wanted(1)
    driver.ready(0)
    driver.send(Drain(0.0))
    assert driver.queue.wake_at_s == 8
    assert driver.tick(8.0) == [StopReplica(0, "no answer 8 s after it was told to drain"), Finish("drained")]


def test_a_drain_with_nothing_running_ends_at_once() -> None:
    assert Driver(3).send(Drain(0.0)) == [Finish("drained")]


def test_a_job_whose_last_unit_commits_while_it_drains_is_done() -> None:
    driver = Driver(1)
    driver.wanted(1)
    (only,) = assigns(driver.ready(0))
    driver.send(Drain(0.0))
    assert driver.committed(only) == [StopReplica(0), Finish("done")]


def test_an_evicted_replica_is_drained_and_its_units_move_on_in_company() -> None:
    """Neither charged nor suspected; the other replica takes both at once, and no start is taken away for it."""
    driver = Driver(4, QueuePolicy(units_in_flight=4))
    driver.wanted(2)
    held = assigns(driver.ready(0))
    driver.ready(1)
    assert driver.send(ReplicaEvicted(0, 0.0)) == [DrainReplica(0), StartReplica(2)]
    assert driver.send(ReplicaEvicted(0, 0.0)) == []
    assert driver.wanted(2) == []
    commands = driver.send(ReplicaDrained(0, 0.0))
    assert commands[0] == StopReplica(0)
    driver.wanted(1)
    moved = assigns(commands) or assigns(driver.ready(2))
    assert [(assign.unit, assign.attempt) for assign in moved] == [(assign.unit, 1) for assign in held][: len(moved)]


@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_an_evicted_replica_that_goes_before_it_drained_blames_nobody(how: str) -> None:
    driver = Driver(4, QueuePolicy(drain_timeout_s=8))
    driver.wanted(1)
    held = assigns(driver.ready(0))
    driver.send(ReplicaEvicted(0, 0.0))
    driver.died(0) if how == "dies" else driver.tick(8.0)
    assert [(it.unit, it.attempt) for it in assigns(driver.ready(1))] == [(it.unit, 1) for it in held]


def test_an_evicted_starting_replica_is_no_failed_start() -> None:
    driver = Driver(4, QueuePolicy(max_start_attempts=1))
    driver.wanted(1)
    assert driver.send(ReplicaEvicted(0, 0.0)) == [StopReplica(0), StartReplica(1)]


def test_blameless_deaths_never_end_the_run_and_suspect_nobody() -> None:
    driver = Driver(4)
    driver.wanted(1)
    for replica_id in range(100):
        assert len(assigns(driver.ready(replica_id))) == 2
        assert driver.died(replica_id, blameless=True) == [StartReplica(replica_id + 1)]


# Starts ------------------------------------------------------------------------------------------------


def test_starts_that_always_fail_beside_a_working_replica_become_rare_and_few() -> None:
    """One broken node among good ones: a day of failures is a hundred starts, not thousands."""
    policy = QueuePolicy(hang_timeout_s=1e9)
    driver = Driver(1000, policy)
    todo = starts(driver.wanted(50))
    driver.ready(todo.pop(0))
    num_starts = len(todo)
    while driver.at_s < 86_400:
        for replica_id in todo:
            driver.send(ReplicaStartFailed(replica_id, "no memory", False, driver.at_s))
        wake_at_s = driver.queue.wake_at_s
        assert wake_at_s is not None
        todo = starts(driver.tick(wake_at_s))
        num_starts += len(todo)
    assert 49 < num_starts < 49 + 86_400 / policy.max_start_backoff_s + 20


def test_a_dead_replicas_device_is_used_again_at_once_although_other_starts_fail() -> None:
    driver = Driver(1000)
    _, *others = starts(driver.wanted(5))
    driver.ready(0)
    for replica_id in others:
        driver.send(ReplicaStartFailed(replica_id, "no memory", False, 0.0))
    assert driver.queue.num_starting == 0
    assert starts(driver.died(0)) != []


def test_suspects_and_probes_wait_for_no_more_than_a_few_busy_replicas_to_run_dry() -> None:
    driver = Driver(1000)
    for replica_id in starts(driver.wanted(20)):
        driver.ready(replica_id)
    driver.wanted(10)
    for replica_id in range(10):
        driver.died(replica_id)
    # Ten are left; one of them runs dry for twenty suspects, nine get what they want.
    before = driver.queue.num_leased
    for replica_id in range(10, 20):
        driver.committed(next(assign for assign in driver.given if assign.replica_id == replica_id))
    assert driver.queue.num_leased == before - 1


def test_what_a_replica_that_went_left_over_goes_to_those_that_had_enough() -> None:
    driver = Driver(8)
    driver.wanted(2)
    assert len(assigns(driver.ready(0, capacity=1000))) == 4
    assert len(assigns(driver.send(ReplicaStartFailed(1, "no memory", False, 0.0)))) == 4
