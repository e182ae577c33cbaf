"""The newest run of an output as it goes on, from its events: what each replica does, how fast, how much longer.

Events tell of a replica's counters every half minute, so rates are of that time, and an object store shows events a
few seconds late.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from batchinfer.pace import PaceMeter
from batchinfer.report.event_values import integer_of, number_of, text_of
from batchinfer.storage.events import Event
from batchinfer.telemetry import ReplicaLook, ReplicaState

#: Replicas that died lately are told of, so many at most.
MAX_DEAD = 8


@dataclass(frozen=True, slots=True)
class RunNow:
    """The newest run at its last event. Rates and shares are None before anything is known of them."""

    run_id: str
    prompt_tokens_per_s: float | None = None
    completion_tokens_per_s: float | None = None
    num_units_in_flight: int = 0
    num_rows_committed: int = 0
    eta_s: float | None = None
    #: Where the time left lies 19 times of 20; an upper end of None beside a lower one is open.
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    replicas: tuple[ReplicaLook, ...] = ()

    @property
    def eta_range_s(self) -> tuple[float, float] | None:
        if self.eta_low_s is None:
            return None
        return self.eta_low_s, math.inf if self.eta_high_s is None else self.eta_high_s


@dataclass(slots=True)
class _Life:
    """What events have told of one replica that is not gone."""

    state: ReplicaState = "starting"
    node: str = ""
    device: str = ""
    units: set[str] = field(default_factory=set)
    #: (time, counters) of its newest ``replica_stats`` and of the one before, or of its being ready.
    newest: tuple[float, Event] | None = None
    before: tuple[float, Event] = (0.0, {})

    def look(self, replica_id: int) -> ReplicaLook:
        newest = self.newest[1] if self.newest is not None else {}
        has_places = integer_of(newest, "num_places") > 0
        idle = self._per_second("idle_s")
        return ReplicaLook(
            replica_id,
            self.state,
            self.node,
            self.device,
            num_units=len(self.units),
            prompt_tokens_per_s=self._per_second("num_prompt_tokens"),
            completion_tokens_per_s=self._per_second("num_completion_tokens"),
            batch_fill=number_of(newest, "batch_fill") if newest else None,
            kv_use=number_of(newest, "kv_use") if has_places else None,
            idle_share=None if idle is None else min(1.0, idle),
            num_prompt_tokens=integer_of(newest, "num_prompt_tokens"),
            num_completion_tokens=integer_of(newest, "num_completion_tokens"),
            num_preemptions=integer_of(newest, "num_preemptions"),
            idle_s=number_of(newest, "idle_s"),
        )

    def _per_second(self, name: str) -> float | None:
        if self.newest is None or self.newest[0] <= self.before[0]:
            return None
        grown = number_of(self.newest[1], name) - number_of(self.before[1], name)
        return max(0.0, grown / (self.newest[0] - self.before[0]))


class RunWatch:
    """Takes the events of all runs, oldest first, and keeps what is true of the newest."""

    def __init__(self) -> None:
        #: Of committed units with dead letters, by their last commit: how many of which type.
        self._dead_letters: dict[str, dict[str, int]] = {}
        self._begin("")

    def watching(self, events: Iterable[Event]) -> Iterator[Event]:
        """Pass the events on."""
        for event in events:
            self.take(event)
            yield event

    def take(self, event: Event) -> None:
        """The next event."""
        kind = event["event"]
        if kind == "unit_leased":
            # Half of all events: nothing but this is to be learnt from them.
            if (life := self._lives.get(integer_of(event, "replica"))) is not None:
                life.units.add(text_of(event, "unit"))
            return
        if kind == "run_started":
            self._begin(text_of(event, "run"))
        try:
            at_s = datetime.fromisoformat(text_of(event, "at")).timestamp()
        except ValueError:
            return
        self._take_at(str(kind), event, at_s)

    def dead_letters_by_type(self) -> dict[str, int]:
        """Of all runs' commits that events tell of; a crash may have swallowed some of those."""
        sums: Counter[str] = Counter()
        for by_type in self._dead_letters.values():
            sums.update(by_type)
        return dict(sums)

    def now(self, num_rows_left: int) -> RunNow:
        """What is true at the last event; ``num_rows_left`` are those not committed yet."""
        looks = [life.look(replica_id) for replica_id, life in sorted(self._lives.items())]
        left = self._pace.time_left(num_rows_left, self._num_ready)
        high_s = None if left is None or left.high_s is None or left.high_s == math.inf else left.high_s
        return RunNow(
            run_id=self._run_id,
            prompt_tokens_per_s=_sum(look.prompt_tokens_per_s for look in looks),
            completion_tokens_per_s=_sum(look.completion_tokens_per_s for look in looks),
            num_units_in_flight=sum(look.num_units for look in looks),
            num_rows_committed=self._num_rows,
            eta_s=None if left is None else left.eta_s,
            eta_low_s=None if left is None else left.low_s,
            eta_high_s=high_s,
            replicas=(*looks, *self._dead[-MAX_DEAD:]),
        )

    def _begin(self, run_id: str) -> None:
        self._run_id = run_id
        self._lives: dict[int, _Life] = {}
        self._dead: list[ReplicaLook] = []
        self._num_rows = 0
        self._num_ready = 0
        self._pace = PaceMeter()

    def _take_at(self, kind: str, event: Event, at_s: float) -> None:
        replica_id = integer_of(event, "replica")
        life = self._lives.get(replica_id)
        # As many were ready until this event as are before it.
        self._pace.add(at_s, self._num_rows, self._num_ready)
        match kind:
            case "replica_starting":
                self._lives[replica_id] = _Life()
            case "replica_ready" if life is not None:
                life.state, life.before = "running", (at_s, {})
                life.node, life.device = text_of(event, "node"), text_of(event, "device")
                self._num_ready += 1
            case "replica_stats" if life is not None:
                if life.newest is not None:
                    life.before = life.newest
                life.newest = (at_s, event)
            case "unit_committed":
                self._committed(event, life)
            case "unit_failed" | "unit_probed" if life is not None:
                life.units.discard(text_of(event, "unit"))
            case "run_stopped":
                for other in self._lives.values():
                    other.state = "draining" if other.state == "running" else other.state
            case "replica_died" | "replica_start_failed" | "replica_drained" | "replica_stopped" if life is not None:
                del self._lives[replica_id]
                self._num_ready -= life.state != "starting"
                if kind == "replica_died":
                    error = text_of(event, "error")
                    self._dead.append(ReplicaLook(replica_id, "dead", life.node, life.device, error=error))

    def _committed(self, event: Event, life: _Life | None) -> None:
        unit_id = text_of(event, "unit")
        self._num_rows += integer_of(event, "num_rows")
        if life is not None:
            life.units.discard(unit_id)
        if by_type := event.get("dead_letters_by_type"):
            if isinstance(by_type, dict):
                counts = {name: count for name, count in by_type.items() if isinstance(count, int)}
                self._dead_letters[unit_id] = counts
        else:
            self._dead_letters.pop(unit_id, None)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
