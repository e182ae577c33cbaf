"""Which unit goes to which replica next. Pure.

Pending units go to the emptiest replica that wants more. Suspects and probes go to replicas that hold nothing; where
there is none, a few busy ones are reserved: they get nothing more and run dry.
"""

from batchinfer.cluster.queue_messages import Assign, Probe, UnitId
from batchinfer.cluster.replica_roster import Place, ReplicaRoster
from batchinfer.cluster.unit_ledger import UnitLedger

#: However many suspects wait, at most one ready replica in so many runs dry for them; always one.
READY_PER_RESERVED = 8


class Placement:
    """Joins the units that wait with the replicas that want some."""

    def __init__(self, ledger: UnitLedger, roster: ReplicaRoster) -> None:
        self._ledger = ledger
        self._roster = roster
        self._num_leases = 0

    def give_out(self) -> list[Assign | Probe]:
        """Lease units until every ready replica holds enough or nothing is left that may go out."""
        ledger, roster = self._ledger, self._roster
        if not roster.num_ready:
            return []
        commands = self._give_out_alone()
        # Starting replicas count: the first one ready must not take what the others will want a minute later.
        fair_share = -(-ledger.num_left // roster.num_staying)
        while ledger.num_pending and (place := roster.hungriest(fair_share)) is not None:
            commands.append(self._assign(place, ledger.take_pending()))
        return commands

    def _give_out_alone(self) -> list[Assign | Probe]:
        ledger, roster = self._ledger, self._roster
        commands: list[Assign | Probe] = []
        if not ledger.num_waiting_alone:
            roster.end_reservations()
            return commands
        for place in roster.idle():
            if ledger.num_suspects:
                commands.append(self._assign(place, ledger.take_suspect(), alone=True))
            elif place.proven or not ledger.num_pending:
                commands.append(self._probe(place, ledger.take_bisected()))
            elif place.reserved or roster.num_reserved < ledger.num_waiting_alone:
                # One unit shows that the replica works; then it is empty again and takes the probe.
                roster.reserve(place)
                commands.append(self._assign(place, ledger.take_pending()))
            if not ledger.num_waiting_alone:
                return commands
        # Replicas that start will be empty; those that are alone now will be soon.
        num_in_sight = roster.num_starting + roster.num_alone + roster.num_reserved
        at_once = min(max(1, roster.num_ready // READY_PER_RESERVED), roster.num_alone + ledger.num_waiting_alone)
        while num_in_sight < at_once and roster.reserve_emptiest():
            num_in_sight += 1
        return commands

    def _assign(self, place: Place, unit_id: UnitId, *, alone: bool = False) -> Assign:
        ledger = self._ledger
        unit, lease = ledger.unit(unit_id), self._lease(place, unit_id, alone=alone)
        return Assign(place.replica_id, unit, ledger.attempt(unit_id), lease, ledger.poisoned(unit_id))

    def _probe(self, place: Place, unit_id: UnitId) -> Probe:
        ledger = self._ledger
        unit, lease = ledger.unit(unit_id), self._lease(place, unit_id, alone=True, probing=True)
        return Probe(place.replica_id, unit, ledger.offsets_to_probe(unit_id), ledger.attempt(unit_id), lease)

    def _lease(self, place: Place, unit_id: UnitId, *, alone: bool, probing: bool = False) -> int:
        self._num_leases += 1
        num_rows = self._ledger.unit(unit_id).num_rows
        self._roster.hold(place, unit_id, num_rows, self._num_leases, alone=alone, probing=probing)
        return self._num_leases
