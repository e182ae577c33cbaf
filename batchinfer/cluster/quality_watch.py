"""The circuit breaker: shares of completions that are amiss, over the rows committed last, held against limits. Pure.

The first units to be committed are the canary: nothing waits for them, and once they hold ``min_rows`` rows a share
above its limit ends the run. What may be generated in vain is bounded by what replicas hold at that moment
(``execution.units_in_flight`` units each, or what fills their batches); it is journaled, not lost. Later on the newest
:data:`WINDOW` times ``min_rows`` rows count, so that an input that turns bad after a million rows is noticed as well,
and the few rows of one small unit do not decide alone.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from batchinfer.quality import QUALITY_KINDS, QualityKind
from batchinfer.records import UnitResult
from batchinfer.storage.events import Event

#: Rows that count, in multiples of the rows that have to be there before anything is decided.
WINDOW = 10


@dataclass(frozen=True, slots=True)
class UnitQuality:
    """What is amiss with the completions of one committed unit."""

    unit_id: str
    num_rows: int
    num_completions: int
    #: Number of completions by kind; kinds that do not occur may be left out.
    counts: Mapping[str, int]

    @staticmethod
    def of(result: UnitResult) -> "UnitQuality":
        """Of a unit committed now. Dead letters are no completions, so neither do their rows count."""
        num_rows = min(result.num_rows, result.num_completions)
        return UnitQuality(result.unit_id, num_rows, result.num_completions, result.quality)


@dataclass(frozen=True, slots=True)
class LimitPassed:
    """A share that is above its limit, and the units it is taken from that have such completions, newest first."""

    kind: QualityKind
    limit: float
    num_amiss: int
    num_completions: int
    unit_ids: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.num_amiss / self.num_completions


class QualityWatch:
    """Give it every committed unit once, in the order of the commits."""

    def __init__(self, limits: Mapping[QualityKind, float], min_rows: int) -> None:
        self._limits = limits
        self._min_rows = min_rows
        self._units: deque[UnitQuality] = deque()
        self._num_rows = 0
        self._num_completions = 0
        self._counts: Counter[str] = Counter()

    def add(self, unit: UnitQuality) -> None:
        """A unit was committed; those too old to count any more are forgotten."""
        if not self._limits:
            return
        self._units.append(unit)
        self._count(unit, 1)
        while self._num_rows - self._units[0].num_rows >= WINDOW * self._min_rows:
            self._count(self._units.popleft(), -1)

    @property
    def passed(self) -> LimitPassed | None:
        """The first of the job's limits that is passed now; None as well while there are too few rows to tell."""
        if self._num_rows < self._min_rows:
            return None
        for kind in QUALITY_KINDS:
            limit = self._limits.get(kind)
            if limit is not None and self._counts[kind] > limit * self._num_completions:
                amiss = tuple(unit.unit_id for unit in reversed(self._units) if unit.counts.get(kind))
                return LimitPassed(kind, limit, self._counts[kind], self._num_completions, amiss)
        return None

    def _count(self, unit: UnitQuality, sign: int) -> None:
        self._num_rows += sign * unit.num_rows
        self._num_completions += sign * unit.num_completions
        for kind, number in unit.counts.items():
            self._counts[kind] += sign * number


def quality_of_earlier_runs(
    events: Iterable[Event], committed: Collection[str], scripts: Collection[str]
) -> Iterator[UnitQuality]:
    """What earlier runs noted of units that are ``committed`` now and still part of the input, in their order.

    It is how a run that is started again with the same limits knows what the last one saw, and a run whose bad shards
    were taken out of the input does not hold them against the others. Runs that asked for other ``scripts`` counted
    something else and are left out. So is what a run stopped for its quality still committed while it drained: it would
    decide by chance whether the next one is stopped as well.
    """
    counts_the_same, seen = False, set[str]()
    for event in events:
        if event["event"] == "run_started":
            counts_the_same, seen = event.get("scripts") == list(scripts), set()
        elif event["event"] == "run_stopped" and event.get("reason") == "quality":
            counts_the_same = False
        unit_id, counts = event.get("unit"), event.get("quality")
        if event["event"] != "unit_committed" or not isinstance(counts, dict) or not isinstance(unit_id, str):
            continue
        # Two replicas that were given the same unit have both told of it.
        if not counts_the_same or unit_id not in committed or unit_id in seen:
            continue
        seen.add(unit_id)
        num_completions = _number(event.get("num_completions"))
        yield UnitQuality(
            unit_id,
            min(_number(event.get("num_rows")), num_completions),
            num_completions,
            {kind: _number(number) for kind, number in counts.items()},
        )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
