"""Who generates which work unit, and what happens when something fails: a pure state machine.

Events come in, commands go out; time is a number inside the events. No Ray, no threads, no clock, so that
every order of events can be tried in a test. The driver executes the commands and feeds back what happened.

A work unit waits, is *leased* to one replica, *committed*, or *given up*. A replica is *starting*, *ready*,
*draining*, or gone. Execution is at-least-once: a replica may die after its unit was committed, so a unit may be
leased again although its part exists; the writer refuses the second part and reports the unit committed, which is
why nothing here has to be exact about deaths.

The rules worth knowing before reading on:

* **Suspects run alone.** When a replica dies, every unit it held may be the culprit. Each is leased again, but
  with nothing beside it, so a second death names the culprit and its neighbours do not use up their attempts.
* **Culprits are bisected.** A unit that died alone goes out as probes, alone as well, until the rows that kill are
  known; then it is leased whole without them (:mod:`batchinfer.cluster.bisection`). As long as there is other work,
  a probe goes only to a replica that has finished something: on a device that kills everything, no row is convicted.
  A unit of which nothing survives, or that dies as a whole although every row survives, is given up.
* **Depth follows capacity.** A replica holds ``units_in_flight`` units and as many more as it takes to keep twice
  its engine's capacity submitted, but never more than its fair share of what is left.
* **Silence is death.** A replica that holds units must show signs of life, one that starts must become ready, one
  that drains must answer; each within its time, or it is ended, and what it held is dealt with as after a death.
* **Draining blames nobody.** What a draining or evicted replica held goes back to its line uncharged.
"""

import math
from collections.abc import Iterable

from batchinfer.cluster.deadlines import Deadlines
from batchinfer.cluster.placement import Placement
from batchinfer.cluster.queue_messages import (
    Command,
    Drain,
    DrainReplica,
    Event,
    Finish,
    Outcome,
    QueueLook,
    ReplicaDied,
    ReplicaDrained,
    ReplicaEvicted,
    ReplicaId,
    ReplicaProgressed,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicasWanted,
    Standing,
    StartReplica,
    StopReplica,
    Tick,
    UnitCommitted,
    UnitFailed,
    UnitId,
    UnitProbed,
)
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.replica_roster import Place, ReplicaRoster
from batchinfer.cluster.unit_ledger import GivenUp, UnitLedger
from batchinfer.records import WorkUnit


class WorkQueue:
    """Feed :meth:`handle` every event in the order it happened; execute what it returns in order."""

    def __init__(self, units: Iterable[WorkUnit], policy: QueuePolicy) -> None:
        self._policy = policy
        self._ledger = UnitLedger(units, policy)
        self._roster = ReplicaRoster(policy)
        self._placement = Placement(self._ledger, self._roster)
        self._deadlines = Deadlines()
        self._now_s = -math.inf
        self._next_replica_id = 0
        self._num_wanted = 0
        self._num_start_failures = 0
        self._may_start_at_s = -math.inf
        #: Deaths that nothing explains yet, since a unit or a probe last succeeded anywhere.
        self._num_deaths = 0
        self._drained_by_s: float | None = None
        self._finished = False

    # What the driver and the progress view read ----------------------------------------------------

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def draining(self) -> bool:
        return self._drained_by_s is not None

    @property
    def given_up(self) -> list[GivenUp]:
        return self._ledger.given_up

    @property
    def num_committed(self) -> int:
        return self._ledger.num_committed

    @property
    def num_pending(self) -> int:
        """Units that wait, for whatever."""
        return self._ledger.num_waiting

    @property
    def num_leased(self) -> int:
        return self._roster.num_leased

    @property
    def num_ready(self) -> int:
        return self._roster.num_ready

    @property
    def num_starting(self) -> int:
        return self._roster.num_starting

    def look(self) -> QueueLook:
        """Everything that progress shows of it."""
        return QueueLook(
            num_units_pending=self.num_pending,
            num_units_leased=self.num_leased,
            num_units_given_up=len(self.given_up),
            num_ready=self.num_ready,
            num_starting=self.num_starting,
            replicas=tuple(Standing(it.replica_id, it.state, len(it.units)) for it in self._roster),
        )

    @property
    def wake_at_s(self) -> float | None:
        """When a Tick is due although nothing may happen before: a backoff or somebody's time ends. None = never."""
        if self._finished:
            return None
        times = [self._deadlines.next_s]
        if self._drained_by_s is not None:
            times.append(self._drained_by_s)
        else:
            if self._ledger.next_due_s is not None:
                times.append(self._ledger.next_due_s)
            if self._roster.num_staying < self._num_useful():
                times.append(self._may_start_at_s)
        earliest_s = min(times)
        return None if earliest_s == math.inf else earliest_s

    # Transitions ------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Advance by one event. Events of replicas that are gone, and repeated ones, change nothing."""
        if self._finished:
            return []
        self._now_s = max(self._now_s, event.at_s)
        commands = self._happened(event)
        for replica_id in () if self._finished else self._deadlines.passed(self._now_s):
            commands += self._deadline_passed(replica_id)
            if self._finished:
                break
        if self._finished:
            return commands
        if not self._ledger.num_left:
            return commands + self._finish("given_up" if self.given_up else "done")
        if self._drained_by_s is not None:
            over = not len(self._roster) or self._now_s >= self._drained_by_s
            return commands + (self._finish("drained") if over else [])
        self._ledger.release_due(self._now_s)
        return commands + self._resize() + self._feed()

    def _happened(self, event: Event) -> list[Command]:
        match event:
            case ReplicaProgressed(replica_id=replica_id, num_signs_of_life=num_signs_of_life):
                self._progressed(replica_id, num_signs_of_life)
            case UnitCommitted(replica_id=replica_id, unit_id=unit_id):
                self._unit_committed(replica_id, unit_id)
            case UnitFailed(replica_id=replica_id, unit_id=unit_id, error=error):
                self._unit_failed(replica_id, unit_id, error)
            case UnitProbed(replica_id=replica_id, unit_id=unit_id, lease=lease):
                self._unit_probed(replica_id, unit_id, lease)
            case ReplicasWanted(num_replicas=num_replicas):
                self._num_wanted = num_replicas
            case ReplicaReady(replica_id=replica_id, capacity=capacity):
                self._replica_ready(replica_id, capacity)
            case ReplicaStartFailed(replica_id=replica_id, error=error, final=final):
                place = self._roster.get(replica_id)
                if place is not None and place.state == "starting":
                    return self._start_failed(place, error, final)
            case ReplicaDied(replica_id=replica_id, error=error, blameless=blameless):
                return self._replica_died(replica_id, error, blameless)
            case ReplicaEvicted(replica_id=replica_id):
                place = self._roster.get(replica_id)
                if place is not None:
                    return self._drain_replica(place)
            case ReplicaDrained(replica_id=replica_id):
                place = self._roster.get(replica_id)
                if place is not None and place.state != "starting":
                    self._free(place)
                    return [StopReplica(replica_id)]
            case Drain():
                return self._drain()
            case Tick():
                pass
        return []

    def _progressed(self, replica_id: ReplicaId, num_signs_of_life: int) -> None:
        place = self._roster.get(replica_id)
        if place is not None and place.num_signs_of_life != num_signs_of_life:
            place.num_signs_of_life = num_signs_of_life
            self._lives(place)

    def _lives(self, place: Place) -> None:
        """A ready replica did something; one that holds nothing need not."""
        if place.state == "ready":
            if place.units:
                self._deadlines.move(place.replica_id, self._now_s + self._policy.hang_timeout_s)
            else:
                self._deadlines.clear(place.replica_id)

    # Replicas ---------------------------------------------------------------------------------------

    def _replica_ready(self, replica_id: ReplicaId, capacity: int) -> None:
        place = self._roster.get(replica_id)
        if place is not None and place.state == "starting":
            self._roster.ready(place, capacity)
            self._lives(place)
            self._num_start_failures = 0

    def _start_failed(self, place: Place, error: str, final: bool) -> list[Command]:
        self._remove(place)
        self._num_start_failures += 1
        if final:
            return self._finish("job_error", error)
        if self._num_start_failures >= self._policy.max_start_attempts and not self._roster.num_ready:
            return self._finish("cannot_start", error)
        self._may_start_at_s = self._now_s + self._policy.start_backoff_after(self._num_start_failures)
        return []

    def _replica_died(self, replica_id: ReplicaId, error: str, blameless: bool) -> list[Command]:
        place = self._roster.get(replica_id)
        if place is None:
            return []
        if blameless or place.state == "draining" or self.draining:
            self._free(place)
            return []
        if place.state == "starting":
            return self._start_failed(place, error, False)
        probing, units = place.probing, self._remove(place)
        if probing:
            # The bisection counts them, and most of them follow a success of the same replica.
            self._ledger.probe_killed(units[0], error)
            return []
        if len(units) == 1:
            self._ledger.died_alone(units[0], error)
        else:
            self._ledger.died_in_company(units)
        # Every attempt of the units of one replica may end in a death, and every replica may die at once. More deaths
        # without one success are the machine's doing, and starting replicas for ever would only burn money.
        self._num_deaths += 1
        limit = self._policy.max_attempts * (self._policy.units_in_flight + 1) + self._num_wanted
        return self._finish("replicas_keep_dying", error) if self._num_deaths > limit else []

    def _deadline_passed(self, replica_id: ReplicaId) -> list[Command]:
        place = self._roster.get(replica_id)
        assert place is not None, "a deadline of a replica that is gone"
        policy = self._policy
        match place.state:
            case "starting":
                reason = f"not ready {policy.start_timeout_s:g} s after its start"
            case "ready":
                reason = f"no sign of life for {policy.hang_timeout_s:g} s while it held {len(place.units)} unit(s)"
            case "draining":
                reason = f"no answer {policy.drain_timeout_s:g} s after it was told to drain"
        return [StopReplica(replica_id, reason), *self._replica_died(replica_id, reason, False)]

    def _drain(self) -> list[Command]:
        if self.draining:
            return []
        self._drained_by_s = self._now_s + self._policy.drain_timeout_s
        commands: list[Command] = []
        for place in self._roster:
            commands += self._drain_replica(place)
        return commands

    def _drain_replica(self, place: Place) -> list[Command]:
        match place.state:
            case "starting":
                self._free(place)
                return [StopReplica(place.replica_id)]
            case "ready":
                self._roster.drain(place)
                self._deadlines.move(place.replica_id, self._now_s + self._policy.drain_timeout_s)
                return [DrainReplica(place.replica_id)]
            case "draining":
                return []

    def _free(self, place: Place) -> None:
        """The replica goes, and nothing that it held is to blame."""
        self._ledger.freed(self._remove(place))

    def _remove(self, place: Place) -> list[UnitId]:
        self._deadlines.clear(place.replica_id)
        if place.state == "ready":
            # Its device is known to be good; others that fail to start must not keep it waiting.
            self._may_start_at_s = min(self._may_start_at_s, self._now_s)
            if self._roster.num_ready == 1:
                self._num_start_failures = 0
        return self._roster.remove(place)

    # Units ------------------------------------------------------------------------------------------

    def _unit_committed(self, replica_id: ReplicaId, unit_id: UnitId) -> None:
        place = self._roster.holder(unit_id)
        if place is not None and place.replica_id == replica_id:
            self._release(place, unit_id)
            self._ledger.committed(unit_id)
            self._succeeded(place)

    def _unit_probed(self, replica_id: ReplicaId, unit_id: UnitId, lease: int | None) -> None:
        place = self._roster.holder(unit_id)
        if place is None or place.replica_id != replica_id or not place.probing:
            return
        if lease is None or place.units[unit_id] == lease:
            self._release(place, unit_id)
            self._ledger.probe_survived(unit_id)
            self._succeeded(place)

    def _succeeded(self, place: Place) -> None:
        place.proven = True
        self._num_deaths = 0

    def _unit_failed(self, replica_id: ReplicaId, unit_id: UnitId, error: str) -> None:
        place = self._roster.holder(unit_id)
        if place is not None and place.replica_id == replica_id:
            self._release(place, unit_id)
            self._ledger.failed(unit_id, error, self._now_s)

    def _release(self, place: Place, unit_id: UnitId) -> None:
        self._roster.release(place, unit_id, self._ledger.unit(unit_id).num_rows)
        self._lives(place)

    # Replicas for units, units for replicas -----------------------------------------------------------

    def _num_useful(self) -> int:
        """Replicas that could have work: never more than there are units left.

        After ``max_start_attempts`` failed starts in a row only one more than were ever ready at once is tried, so
        that a node on which nothing starts is asked now and then and not for ever.
        """
        num_useful = min(self._num_wanted, self._ledger.num_left)
        if self._num_start_failures >= self._policy.max_start_attempts:
            num_useful = min(num_useful, self._roster.most_ready + 1)
        return num_useful

    def _resize(self) -> list[Command]:
        """Start replicas the cluster has room for; drop starting ones it lost the room for."""
        commands: list[Command] = []
        if self._now_s >= self._may_start_at_s:
            for _ in range(self._num_useful() - self._roster.num_staying):
                replica_id, self._next_replica_id = self._next_replica_id, self._next_replica_id + 1
                self._roster.starting(replica_id)
                self._deadlines.move(replica_id, self._now_s + self._policy.start_timeout_s)
                commands.append(StartReplica(replica_id))
        num_too_many = self._roster.num_staying - self._num_wanted
        if num_too_many > 0:
            for place in [place for place in self._roster if place.state == "starting"][:num_too_many]:
                self._free(place)
                commands.append(StopReplica(place.replica_id))
        return commands

    def _feed(self) -> list[Command]:
        commands = self._placement.give_out()
        for command in commands:
            # Who held something already is given no more time: a further unit is no sign of life.
            if command.replica_id not in self._deadlines:
                self._deadlines.move(command.replica_id, self._now_s + self._policy.hang_timeout_s)
        return list(commands)

    def _finish(self, outcome: Outcome, error: str = "") -> list[Command]:
        self._finished = True
        commands: list[Command] = [StopReplica(place.replica_id) for place in self._roster]
        for place in self._roster:
            self._free(place)
        return [*commands, Finish(outcome, error)]

    # Self-check ---------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise AssertionError where an invariant is broken; tests call it after every event."""
        ledger, roster = self._ledger, self._roster
        roster.validate(lambda unit_id: ledger.unit(unit_id).num_rows)
        ledger.validate(roster.held(), roster.probed())
        timed = {place.replica_id for place in roster if place.state != "ready" or place.units}
        assert self._deadlines.replicas() == timed, "a replica could be silent for ever"
        if self._finished:
            assert not len(roster), "finished with a replica left"
            return
        assert ledger.num_left, "unfinished with nothing left to do"
        if self.draining:
            assert roster.num_draining == len(roster) > 0, "a replica does not drain with the job"
        elif roster.num_ready and not (roster.num_leased or roster.num_starting):
            assert ledger.num_waiting == ledger.num_delayed, "a replica is idle while a unit waits"
