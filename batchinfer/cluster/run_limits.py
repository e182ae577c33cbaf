"""What ends a run before its work is done, other than a signal: poor quality, the deadline, spent GPU hours.

The decisions are pure and lie in ``quality_watch`` and ``allowance``; here they get what earlier runs left in the
output's events, and become the errors a run ends with.
"""

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

from batchinfer.cluster.allowance import (
    Allowance,
    GpuMeter,
    Spent,
    Use,
    left_text,
    spent_text,
    use_of_earlier_runs,
    ways_on,
)
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.quality_watch import LimitPassed, QualityWatch, UnitQuality, quality_of_earlier_runs
from batchinfer.errors import AllowanceSpent, BatchinferError, PoorQuality
from batchinfer.models.files import has_tokenizer
from batchinfer.moments import next_moment, parse_deadline
from batchinfer.quality import CompletionJudge
from batchinfer.records import COMPLETION, FINISH_REASON, ROW_ID, TOKEN_IDS, UnitResult
from batchinfer.storage.events import Event, read_events
from batchinfer.storage.layout import completions_part
from batchinfer.storage.part_reader import read_part
from batchinfer.telemetry import shown

Stop = Literal["quality", "deadline", "gpu_hours"]
Clock = Callable[[], datetime]

#: Completions that are shown as examples, and how much of each.
NUM_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 80
#: Parts that are read in search of them.
_MAX_PARTS_READ = 3

_QUALITY_EVENTS = ("run_started", "run_stopped", "unit_committed")
_USE_EVENTS = (
    "run_started",
    "run_finished",
    "replica_starting",
    "replica_ready",
    "replica_stats",
    "replica_died",
    "replica_stopped",
    "replica_drained",
    "unit_committed",
)
_AMISS = {
    "empty": "are empty",
    "truncated": "were cut off by max_new_tokens or the model's length",
    "repeating": "end in a loop",
    "wrong_script": "are in another script than quality.script",
}


class RunLimits:
    """The limits of one run. Asked once round the loop; reads the events of earlier runs only where a limit needs them.

    ``clock`` is the wall clock, which a machine's sleep does not stop.
    """

    def __init__(self, preparation: Preparation, clock: Clock = lambda: datetime.now(UTC)) -> None:
        spec = preparation.spec
        self._preparation = preparation
        self._clock = clock
        execution, quality = spec.execution, spec.quality
        self._allowance = Allowance(
            ends_at=next_moment(parse_deadline(execution.deadline), clock()) if execution.deadline else None,
            max_gpu_s=execution.max_gpu_hours * 3600 if execution.max_gpu_hours is not None else None,
        )
        self._quality = QualityWatch(quality.limits, quality.min_rows)
        self._passed: LimitPassed | None = None
        self._counted: set[str] = set()
        # A retry is about dead letters: what the run has committed before it is not its business.
        if quality.limits and preparation.retry is None:
            committed = {unit.unit_id for unit in preparation.plan.units}
            committed -= {unit.unit_id for unit in preparation.pending}
            for unit in quality_of_earlier_runs(self._events(_QUALITY_EVENTS), committed, quality.scripts):
                self._quality.add(unit)
        self._before = Use()
        if self._allowance.max_gpu_s is not None:
            self._before = use_of_earlier_runs(self._events(_USE_EVENTS))
        self._meter = GpuMeter()
        self._eta_s: float | None = None

    def check(self) -> None:
        """Before anything is started.

        Raises:
            PoorQuality: what earlier runs have committed is above a limit of this job already.
            AllowanceSpent: the deadline is over, or earlier runs have used the GPU hours up.
        """
        self.check_quality()
        if not self._preparation.pending:
            return
        spent = self._allowance.spent(self._clock(), self._before.gpu_s, 1.0)
        if spent is not None:
            raise AllowanceSpent(f"nothing was started: {self._spent(spent, self._rows_pending)}")

    def unit_committed(self, result: UnitResult) -> None:
        """Count a unit; once only, although two replicas may tell of it."""
        if result.unit_id not in self._counted:
            self._counted.add(result.unit_id)
            self._quality.add(UnitQuality.of(result))

    def replica_starting(self, replica_id: int, num_gpus: float) -> None:
        """A replica with so many GPUs was asked for."""
        self._meter.starting(replica_id, num_gpus)

    def replica_ready(self, replica_id: int, start_s: float) -> None:
        """A replica holds its GPUs since ``start_s`` seconds ago."""
        self._meter.ready(replica_id, self._now_s(), start_s)

    def replica_gone(self, replica_id: int) -> None:
        """A replica has given back what it held."""
        self._meter.gone(replica_id, self._now_s())

    def reached(self) -> Stop | None:
        """Why the run is to drain now, if it is."""
        # Kept: what is still committed while the run drains may bring the share below its limit again.
        self._passed = self._passed or self._quality.passed
        if self._passed is not None:
            return "quality"
        gpu_s = self._before.gpu_s + self._meter.gpu_s(self._now_s())
        return self._allowance.spent(self._clock(), gpu_s, self._meter.num_gpus)

    def note_rate(self, eta_s: float | None) -> None:
        """How long the rest would take, while there are still replicas to tell it by."""
        self._eta_s = eta_s

    def check_quality(self) -> None:
        """Raises PoorQuality when a limit is passed by what is committed, be it all there is."""
        if (passed := self._quality.passed) is not None:
            raise PoorQuality(self._quality_text(passed))

    def stopped(self, stop: Stop, stopped_text: str, num_rows_left: int, num_rows_committed: int) -> BatchinferError:
        """The error of a run that has drained for ``stop``; ``stopped_text`` tells what is committed and journaled."""
        if stop == "quality":
            assert self._passed is not None, "nothing else stops a run for its quality"
            return PoorQuality(f"{self._quality_text(self._passed)}\n{stopped_text}")
        return AllowanceSpent(f"{stopped_text}; {self._spent(stop, num_rows_left, num_rows_committed)}")

    def _spent(self, spent: Spent, num_rows_left: int, num_rows_committed: int = 0) -> str:
        gpu_s = self._before.gpu_s + self._meter.gpu_s(self._now_s())
        use = Use(gpu_s, self._before.num_rows + num_rows_committed)
        hours = use.gpu_hours_for(num_rows_left) if spent == "gpu_hours" else None
        left = left_text(num_rows_left, self._eta_s, hours)
        return f"{spent_text(self._allowance, spent, gpu_s)}; {left}; {ways_on(spent)}"

    def _quality_text(self, passed: LimitPassed) -> str:
        examples = "".join(f"\n  {row_id}: {text}" for row_id, text in self._examples(passed))
        return (
            f"quality.max_{passed.kind}: {passed.num_amiss:,} of the last {passed.num_completions:,} completions "
            f"{_AMISS[passed.kind]} ({passed.share:.1%}, the limit is {passed.limit:.1%})"
            f"{', for example:' if examples else ''}{examples}\n"
            "Change the job and give it another output.path, or, if these are right, raise "
            f"quality.max_{passed.kind} and run the same output again: what is committed and journaled stays."
        )

    def _examples(self, passed: LimitPassed) -> list[tuple[str, str]]:
        """Row ids and beginnings of completions, read back from the newest parts; fewer where a part cannot be read."""
        spec = self._preparation.spec
        has_text = spec.prompt.token_ids is None or has_tokenizer(self._preparation.facts.model.directory)
        judge = CompletionJudge(spec.quality.scripts, has_text)

        def amiss(unit_id: str) -> Iterator[tuple[str, str]]:
            try:
                part = read_part(completions_part(self._preparation.output, unit_id))
            except BatchinferError:
                # The run ends with what is known; `verify` is who looks into parts.
                return
            token_ids = part.column(TOKEN_IDS) if TOKEN_IDS in part.column_names else None
            columns = [part.column(name).to_pylist() for name in (ROW_ID, COMPLETION, FINISH_REASON)]
            for index, (row_id, text, finish_reason) in enumerate(zip(*columns, strict=True)):
                ids = token_ids[index].as_py() if token_ids is not None else ()
                if passed.kind in judge.kinds_of(text, ids, finish_reason):
                    yield row_id, shown(repr(text[:_EXAMPLE_CHARACTERS]))

        found = itertools.chain.from_iterable(amiss(unit_id) for unit_id in passed.unit_ids[:_MAX_PARTS_READ])
        return list(itertools.islice(found, NUM_EXAMPLES))

    @property
    def _rows_pending(self) -> int:
        return sum(unit.num_rows for unit in self._preparation.pending)

    def _events(self, kinds: tuple[str, ...]) -> Iterator[Event]:
        return read_events(self._preparation.output, kinds)

    def _now_s(self) -> float:
        return self._clock().timestamp()
