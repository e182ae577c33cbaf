"""Where every unit stands: what waits, what is done, and what is known against a unit. Pure.

A unit waits in one of three lines. *Pending* units go out in company. *Suspects* were held by a replica that died
and go out alone. *Bisected* ones died alone and go out as probes, alone as well. Whatever fails in a way that time
may heal is *delayed* and then comes back to its line.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass

from batchinfer.cluster.bisection import Bisection
from batchinfer.cluster.queue_messages import UnitId
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.records import WorkUnit


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A unit that failed on every attempt of this run."""

    unit: WorkUnit
    num_attempts: int
    error: str


@dataclass(slots=True)
class _Record:
    """What is known against one unit; only units that had trouble have one."""

    #: Tries that ended in a failure or in a death of the whole unit, for the count that users see.
    num_tries: int = 0
    #: Failures on a living replica since the unit last got further.
    num_failures: int = 0
    #: Deaths as a whole and alone that no poison row explains.
    num_deaths: int = 0
    #: Was with a replica that died: it has no company any more.
    suspect: bool = False
    poisoned: tuple[int, ...] = ()
    bisection: Bisection | None = None


class UnitLedger:
    """Every unit is in one place: a line, the delayed ones, a replica's hands, committed, or given up."""

    def __init__(self, units: Iterable[WorkUnit], policy: QueuePolicy) -> None:
        self._policy = policy
        self._units: dict[UnitId, WorkUnit] = {unit.unit_id: unit for unit in units}
        self._pending: deque[UnitId] = deque(self._units)
        self._suspects: deque[UnitId] = deque()
        self._bisected: deque[UnitId] = deque()
        self._delayed: list[tuple[float, UnitId]] = []
        self._records: dict[UnitId, _Record] = {}
        self._committed: set[UnitId] = set()
        self.given_up: list[GivenUp] = []
        #: Units that are being bisected, wherever they are just now.
        self.num_bisections = 0

    # Reading ------------------------------------------------------------------------------------------

    @property
    def num_committed(self) -> int:
        return len(self._committed)

    @property
    def num_left(self) -> int:
        """Units that are neither committed nor given up."""
        return len(self._units) - len(self._committed) - len(self.given_up)

    @property
    def num_waiting(self) -> int:
        return len(self._pending) + len(self._delayed) + self.num_waiting_alone

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_delayed(self) -> int:
        return len(self._delayed)

    @property
    def num_suspects(self) -> int:
        return len(self._suspects)

    @property
    def num_waiting_alone(self) -> int:
        """Units that may go out now, but only to a replica that holds nothing else."""
        return len(self._suspects) + len(self._bisected)

    @property
    def next_due_s(self) -> float | None:
        """When the first delayed unit comes back."""
        return self._delayed[0][0] if self._delayed else None

    def unit(self, unit_id: UnitId) -> WorkUnit:
        return self._units[unit_id]

    def attempt(self, unit_id: UnitId) -> int:
        """Number of the try that is about to begin, from 1."""
        record = self._records.get(unit_id)
        return 1 + (record.num_tries if record is not None else 0)

    def poisoned(self, unit_id: UnitId) -> tuple[int, ...]:
        """Offsets of the unit's rows that are known to kill their replica, ascending."""
        record = self._records.get(unit_id)
        return record.poisoned if record is not None else ()

    def offsets_to_probe(self, unit_id: UnitId) -> range:
        """The next probe of a unit that is being bisected."""
        return self._bisection(unit_id).next_offsets

    # Out to a replica ---------------------------------------------------------------------------------

    def take_pending(self) -> UnitId:
        return self._pending.popleft()

    def take_suspect(self) -> UnitId:
        return self._suspects.popleft()

    def take_bisected(self) -> UnitId:
        return self._bisected.popleft()

    # And back -----------------------------------------------------------------------------------------

    def committed(self, unit_id: UnitId) -> None:
        self._close(unit_id)
        self._committed.add(unit_id)

    def failed(self, unit_id: UnitId, error: str, at_s: float) -> None:
        """The try failed on a living replica: wait and try the same again, ``max_attempts`` times."""
        record = self._record(unit_id)
        record.num_tries += 1
        record.num_failures += 1
        if record.num_failures >= self._policy.max_attempts:
            self._give_up(unit_id, record, error)
        else:
            due_s = at_s + self._policy.backoff_after(record.num_failures)
            heapq.heappush(self._delayed, (due_s, unit_id))

    def freed(self, unit_ids: Iterable[UnitId]) -> None:
        """The replica went without a fault of its units: they are next in their lines, as if never taken."""
        for unit_id in reversed(list(unit_ids)):
            self._line(unit_id).appendleft(unit_id)

    def died_in_company(self, unit_ids: Iterable[UnitId]) -> None:
        """One of these units may have killed its replica; nobody is charged, all go alone from now on."""
        for unit_id in unit_ids:
            self._record(unit_id).suspect = True
            self._line(unit_id).append(unit_id)

    def died_alone(self, unit_id: UnitId, error: str) -> None:
        """The whole unit was all that its dead replica held: look for the row.

        With ``max_attempts`` such deaths that no poison row explains, or two if that is more, the unit is given up:
        what kills is not a row then, and the bisection has had its say.
        """
        record = self._record(unit_id)
        record.suspect = True
        record.num_tries += 1
        record.num_deaths += 1
        if record.num_deaths >= max(2, self._policy.max_attempts):
            self._give_up(unit_id, record, error)
            return
        record.bisection = Bisection(self._units[unit_id].num_rows, record.poisoned)
        self.num_bisections += 1
        self._go_on(unit_id, record, record.bisection)

    def probe_survived(self, unit_id: UnitId) -> None:
        bisection = self._bisection(unit_id)
        bisection.survived()
        record = self._records[unit_id]
        record.num_failures = 0
        self._go_on(unit_id, record, bisection)

    def probe_killed(self, unit_id: UnitId, error: str) -> None:
        bisection = self._bisection(unit_id)
        bisection.killed()
        record = self._records[unit_id]
        if bisection.hopeless and not bisection.finished:
            self._give_up(
                unit_id, record, f"{error} (as of the last {bisection.num_deaths_in_a_row} tries of single rows or few)"
            )
        else:
            self._go_on(unit_id, record, bisection)

    def release_due(self, at_s: float) -> None:
        """Delayed units whose time has come go back to the front of their lines."""
        due: list[UnitId] = []
        while self._delayed and self._delayed[0][0] <= at_s:
            due.append(heapq.heappop(self._delayed)[1])
        self.freed(due)

    # ---------------------------------------------------------------------------------------------------

    def _record(self, unit_id: UnitId) -> _Record:
        return self._records.setdefault(unit_id, _Record())

    def _bisection(self, unit_id: UnitId) -> Bisection:
        bisection = self._records[unit_id].bisection
        assert bisection is not None, f"unit {unit_id} is not being bisected"
        return bisection

    def _line(self, unit_id: UnitId) -> deque[UnitId]:
        record = self._records.get(unit_id)
        if record is None or not record.suspect:
            return self._pending
        return self._suspects if record.bisection is None else self._bisected

    def _go_on(self, unit_id: UnitId, record: _Record, bisection: Bisection) -> None:
        """To the next probe, or whole again without the rows that were found; either way before other suspects."""
        if bisection.finished:
            record.bisection = None
            self.num_bisections -= 1
            if bisection.found:
                record.poisoned = tuple(sorted((*record.poisoned, *bisection.found)))
                record.num_deaths = 0
        self._line(unit_id).appendleft(unit_id)

    def _give_up(self, unit_id: UnitId, record: _Record, error: str) -> None:
        self.given_up.append(GivenUp(self._units[unit_id], record.num_tries, error))
        self._close(unit_id)

    def _close(self, unit_id: UnitId) -> None:
        record = self._records.pop(unit_id, None)
        if record is not None and record.bisection is not None:
            self.num_bisections -= 1

    def validate(self, held: Set[UnitId], probed: Set[UnitId]) -> None:
        """Raise AssertionError where an invariant is broken; ``held`` and of these ``probed`` are with replicas."""
        waiting = [*self._pending, *self._suspects, *self._bisected, *(unit_id for _, unit_id in self._delayed)]
        closed = [*self._committed, *(record.unit.unit_id for record in self.given_up)]
        places = [*waiting, *held, *closed]
        assert len(places) == len(set(places)), "a unit is in two places"
        assert set(places) == set(self._units), "a unit is nowhere"
        assert self.num_left == len(waiting) + len(held), "units left miscounted"
        assert not set(self._records) & set(closed), "a closed unit is still on record"
        bisected = {unit_id for unit_id, record in self._records.items() if record.bisection is not None}
        assert self.num_bisections == len(bisected), "bisections miscounted"
        assert bisected >= set(self._bisected) | probed, "a unit is probed without a bisection"
        for line in (self._pending, self._suspects, self._bisected):
            assert all(self._line(unit_id) is line for unit_id in line), "a unit waits in the wrong line"
        for unit_id, record in self._records.items():
            rows = range(self._units[unit_id].num_rows)
            assert list(record.poisoned) == [row for row in rows if row in record.poisoned], "poison rows out of order"
            assert record.num_failures < self._policy.max_attempts, "a unit failed too often and lives"
            assert record.num_deaths < max(2, self._policy.max_attempts), "a unit died too often and lives"
            if record.bisection is not None:
                assert record.suspect, "a unit is bisected without a suspicion"
                assert not record.bisection.finished, "a bisection is over and goes on"
                record.bisection.validate()
