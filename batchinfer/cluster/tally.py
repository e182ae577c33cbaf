"""The counting of a run: what units and replicas report, summed into progress and result. Pure."""

from collections import Counter
from dataclasses import dataclass, field

from batchinfer.engine.engine import EngineStats
from batchinfer.records import UnitResult
from batchinfer.telemetry import RateMeter, RunProgress


@dataclass(slots=True)
class Tally:
    """Counts since the run began; ``samples_per_row`` turns the engine's sequences into rows."""

    num_rows: int
    num_units: int
    num_rows_before: int
    num_units_before: int
    num_dead_letters_before: int
    samples_per_row: int
    num_rows_committed: int = 0
    num_units_committed: int = 0
    num_completions: int = 0
    num_dead_letters: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_replicas_died: int = 0
    dead_letters_by_type: Counter[str] = field(default_factory=Counter)
    _live: dict[int, EngineStats] = field(default_factory=dict)
    _rows_committed_by: Counter[int] = field(default_factory=Counter)
    _gone_prompt_tokens: int = 0
    _gone_completion_tokens: int = 0
    _rates: RateMeter = field(default_factory=RateMeter)

    def unit_committed(self, replica_id: int, result: UnitResult) -> None:
        """Count one unit, committed now or found committed by a replica that died before it could say so."""
        self.num_rows_committed += result.num_rows
        self.num_units_committed += 1
        self.num_completions += result.num_completions
        self.num_dead_letters += result.num_dead_letters
        self.num_prompt_tokens += result.num_prompt_tokens
        self.num_completion_tokens += result.num_completion_tokens
        self.dead_letters_by_type.update(result.dead_letters_by_type)
        self._rows_committed_by[replica_id] += result.num_rows

    def replica_reported(self, replica_id: int, stats: EngineStats) -> None:
        """Keep a replica's newest counters."""
        self._live[replica_id] = stats

    def replica_died(self, replica_id: int) -> None:
        """Its tokens were generated, whatever became of them; its unfinished rows were not."""
        self.num_replicas_died += 1
        stats = self._live.pop(replica_id, EngineStats())
        self._gone_prompt_tokens += stats.num_prompt_tokens
        self._gone_completion_tokens += stats.num_completion_tokens
        del self._rows_committed_by[replica_id]

    def progress(
        self, at_s: float, elapsed_s: float, num_ready: int, num_starting: int, num_given_up: int
    ) -> RunProgress:
        """The numbers of this moment; call it about once a second, rates are taken between the calls."""
        finished = sum(
            max(0, stats.num_finished // self.samples_per_row - self._rows_committed_by[replica_id])
            for replica_id, stats in self._live.items()
        )
        prompt_tokens = self._gone_prompt_tokens + sum(stats.num_prompt_tokens for stats in self._live.values())
        completion_tokens = self._gone_completion_tokens + sum(s.num_completion_tokens for s in self._live.values())
        self._rates.add(at_s, self.num_rows_committed + finished, prompt_tokens, completion_tokens)
        rows_per_s, prompt_tokens_per_s, completion_tokens_per_s = self._rates.per_second()
        num_done = self.num_rows_before + self.num_rows_committed
        num_left = max(0, self.num_rows - num_done - finished)
        return RunProgress(
            elapsed_s=elapsed_s,
            num_rows=self.num_rows,
            num_rows_committed=num_done,
            num_rows_finished=finished,
            num_units=self.num_units,
            num_units_committed=self.num_units_before + self.num_units_committed,
            num_units_given_up=num_given_up,
            num_dead_letters=self.num_dead_letters_before + self.num_dead_letters,
            num_prompt_tokens=prompt_tokens,
            num_completion_tokens=completion_tokens,
            num_replicas_ready=num_ready,
            num_replicas_starting=num_starting,
            prompt_tokens_per_s=prompt_tokens_per_s,
            completion_tokens_per_s=completion_tokens_per_s,
            eta_s=num_left / rows_per_s if rows_per_s > 0 else None,
            dead_letters_by_type=dict(self.dead_letters_by_type),
        )
