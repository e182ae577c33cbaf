"""The replicas there are, what each holds, and which of them gets the next unit. Pure.

Made for a thousand replicas: an event about one replica costs no walk over the others. Replicas that may want
more wait in a heap, the emptiest first; entries that are no longer true are skipped when they come up.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from batchinfer.cluster.queue_messages import ReplicaId, UnitId
from batchinfer.cluster.queue_policy import QueuePolicy


@dataclass(slots=True)
class Place:
    """One replica as the queue sees it."""

    replica_id: ReplicaId
    #: ``draining``: gets nothing more, and what it holds is about to come back.
    state: Literal["starting", "ready", "draining"] = "starting"
    capacity: int = 0
    #: Has finished something since its start, so that a death is not just a sick device's.
    proven: bool = False
    #: Holds one suspect or probe and gets nothing beside it.
    alone: bool = False
    probing: bool = False
    #: Gets nothing until it is empty, and then a suspect or a probe.
    reserved: bool = False
    #: Unit and number of its lease.
    units: dict[UnitId, int] = field(default_factory=dict)
    num_rows_leased: int = 0
    num_signs_of_life: int | None = None
    #: Number of units under which the replica waits in the heap of hungry ones; None = it does not.
    queued_with: int | None = None


class ReplicaRoster:
    """All replicas that were started and are not gone."""

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = policy
        self._places: dict[ReplicaId, Place] = {}
        self._holder: dict[UnitId, ReplicaId] = {}
        self._hungry: list[tuple[int, ReplicaId]] = []
        self._idle: dict[ReplicaId, None] = {}
        self._reserved: dict[ReplicaId, None] = {}
        self.num_ready = 0
        self.num_draining = 0
        self.num_alone = 0
        #: The most replicas that were ready at once: so many devices are known to be good.
        self.most_ready = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place]:
        return iter(tuple(self._places.values()))

    def get(self, replica_id: ReplicaId) -> Place | None:
        return self._places.get(replica_id)

    @property
    def num_starting(self) -> int:
        return len(self._places) - self.num_ready - self.num_draining

    @property
    def num_staying(self) -> int:
        """Replicas that work or will: all but the draining ones."""
        return len(self._places) - self.num_draining

    @property
    def num_leased(self) -> int:
        return len(self._holder)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    def holder(self, unit_id: UnitId) -> Place | None:
        replica_id = self._holder.get(unit_id)
        return None if replica_id is None else self._places[replica_id]

    # Coming and going ---------------------------------------------------------------------------------

    def starting(self, replica_id: ReplicaId) -> None:
        self._places[replica_id] = Place(replica_id)

    def ready(self, place: Place, capacity: int) -> None:
        place.state, place.capacity = "ready", max(1, capacity)
        self.num_ready += 1
        self.most_ready = max(self.most_ready, self.num_ready)
        self._idle[place.replica_id] = None
        self._queue(place)

    def drain(self, place: Place) -> None:
        """Feed it no more; its units stay with it until it is removed."""
        place.state = "draining"
        self.num_ready -= 1
        self.num_draining += 1
        self._forget(place)

    def remove(self, place: Place) -> list[UnitId]:
        """Strike it off; gives back the units that it held, first leased first."""
        del self._places[place.replica_id]
        self.num_ready -= place.state == "ready"
        self.num_draining -= place.state == "draining"
        self.num_alone -= place.alone
        self._forget(place)
        for unit_id in place.units:
            del self._holder[unit_id]
        return list(place.units)

    def _forget(self, place: Place) -> None:
        self._idle.pop(place.replica_id, None)
        self._reserved.pop(place.replica_id, None)
        place.reserved = False
        # With fewer replicas each one's fair share has grown, also that of those that had enough.
        for other in self._places.values():
            if other.state == "ready":
                self._queue(other)

    # Units --------------------------------------------------------------------------------------------

    def hold(
        self, place: Place, unit_id: UnitId, num_rows: int, lease: int, *, alone: bool, probing: bool = False
    ) -> None:
        """The replica is given the unit."""
        place.units[unit_id] = lease
        place.num_rows_leased += num_rows
        self._holder[unit_id] = place.replica_id
        self._idle.pop(place.replica_id, None)
        place.alone, place.probing = alone, probing
        if alone:
            self.num_alone += 1
            place.reserved = False
            self._reserved.pop(place.replica_id, None)
        self._queue(place)

    def release(self, place: Place, unit_id: UnitId, num_rows: int) -> None:
        """The replica is through with the unit, one way or the other."""
        del self._holder[unit_id]
        del place.units[unit_id]
        place.num_rows_leased -= num_rows
        self.num_alone -= place.alone
        place.alone = place.probing = False
        if place.state == "ready":
            if not place.units:
                self._idle[place.replica_id] = None
            self._queue(place)

    # Who is next --------------------------------------------------------------------------------------

    def idle(self) -> list[Place]:
        """Ready replicas that hold nothing, longest idle first."""
        return [self._places[replica_id] for replica_id in self._idle]

    def reserve(self, place: Place) -> None:
        place.reserved = True
        self._reserved[place.replica_id] = None

    def reserve_emptiest(self) -> bool:
        """Let one more busy replica run dry; False when there is none."""
        free = (place for place in self._places.values() if place.state == "ready" and place.units)
        free = (place for place in free if not place.alone and not place.reserved)
        emptiest = min(free, key=lambda place: (len(place.units), place.replica_id), default=None)
        if emptiest is not None:
            self.reserve(emptiest)
        return emptiest is not None

    def end_reservations(self) -> None:
        """Nothing waits for an empty replica any more."""
        for replica_id in self._reserved:
            self._places[replica_id].reserved = False
            self._queue(self._places[replica_id])
        self._reserved.clear()

    def hungriest(self, fair_share: int) -> Place | None:
        """The emptiest replica that wants one more unit, if any does."""
        while self._hungry:
            num_units, replica_id = self._hungry[0]
            place = self._places.get(replica_id)
            if place is not None and place.queued_with == num_units:
                if self._wants_more(place, fair_share):
                    return place
                place.queued_with = None
            heapq.heappop(self._hungry)
        return None

    def _queue(self, place: Place) -> None:
        if place.queued_with != len(place.units):
            place.queued_with = len(place.units)
            heapq.heappush(self._hungry, (place.queued_with, place.replica_id))

    def _wants_more(self, place: Place, fair_share: int) -> bool:
        if place.state != "ready" or place.alone or place.reserved:
            return False
        if len(place.units) >= min(fair_share, self._policy.max_units_held):
            return False
        submitted = place.num_rows_leased * self._policy.samples_per_row
        return len(place.units) < self._policy.units_in_flight or submitted < 2 * place.capacity

    # Self-check ---------------------------------------------------------------------------------------

    def held(self) -> set[UnitId]:
        return set(self._holder)

    def probed(self) -> set[UnitId]:
        return {unit_id for place in self._places.values() if place.probing for unit_id in place.units}

    def validate(self, num_rows: Callable[[UnitId], int]) -> None:
        """Raise AssertionError where an invariant is broken; ``num_rows`` of a unit."""
        places = list(self._places.values())
        held = {unit_id: place.replica_id for place in places for unit_id in place.units}
        assert held == self._holder, "leases and holders differ"
        assert self.num_leased == sum(len(place.units) for place in places), "a unit is held twice"
        assert self.num_ready == sum(place.state == "ready" for place in places), "ready miscounted"
        assert self.num_draining == sum(place.state == "draining" for place in places), "draining miscounted"
        assert self.num_alone == sum(place.alone for place in places), "suspects miscounted"
        ready = {place.replica_id: place for place in places if place.state == "ready"}
        assert set(self._idle) == {replica_id for replica_id, place in ready.items() if not place.units}
        assert set(self._reserved) == {place.replica_id for place in places if place.reserved} <= set(ready)
        queued = set(self._hungry)
        for place in places:
            assert place.state != "starting" or not place.units, "a starting replica holds units"
            assert not place.alone or len(place.units) == 1, "a suspect has company"
            assert place.alone or not place.probing, "a probe has company"
            rows = sum(num_rows(unit_id) for unit_id in place.units)
            assert rows == place.num_rows_leased, "leased rows miscounted"
            if place.queued_with is not None:
                assert (place.queued_with, place.replica_id) in queued, "a hungry replica is not in the heap"
