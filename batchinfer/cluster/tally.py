"""The counting of a run: what units and replicas report, summed into progress and result. Pure."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from batchinfer.cluster.messages import ReplicaProgress
from batchinfer.engine.engine import EngineStats
from batchinfer.records import UnitResult
from batchinfer.telemetry import RATE_WINDOW_S, EngineUse, RateMeter, RunProgress


@dataclass(slots=True)
class _Reports:
    """What one ready replica has told: its newest counters, and its idle time at two earlier looks."""

    capacity: int
    stats: EngineStats
    idle_s: float
    at_s: float
    #: (time, idle seconds): the share is taken from the first, which is replaced by the second as it ages.
    earlier: tuple[float, float]
    between: tuple[float, float]

    def add(self, at_s: float, progress: ReplicaProgress) -> None:
        self.stats, self.idle_s, self.at_s = progress.stats, progress.idle_s, at_s
        if at_s - self.between[0] > RATE_WINDOW_S / 2:
            self.earlier, self.between = self.between, (at_s, progress.idle_s)

    @property
    def idle_share(self) -> float | None:
        span_s = self.at_s - self.earlier[0]
        return min(1.0, max(0.0, (self.idle_s - self.earlier[1]) / span_s)) if span_s > 0 else None


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
    num_resumed_tokens: int = 0
    num_replicas_died: int = 0
    dead_letters_by_type: Counter[str] = field(default_factory=Counter)
    _live: dict[int, _Reports] = field(default_factory=dict)
    _counted: set[str] = field(default_factory=set)
    _rows_committed_by: Counter[int] = field(default_factory=Counter)
    _gone_prompt_tokens: int = 0
    _gone_completion_tokens: int = 0
    _rates: RateMeter = field(default_factory=RateMeter)

    def unit_committed(self, replica_id: int, result: UnitResult) -> None:
        """Count one unit, committed now or found committed by a replica that died before it could say so.

        Once only, although both of two replicas that were given a unit may say so.
        """
        if result.unit_id in self._counted:
            return
        self._counted.add(result.unit_id)
        self.num_rows_committed += result.num_rows
        self.num_units_committed += 1
        self.num_completions += result.num_completions
        self.num_dead_letters += result.num_dead_letters
        self.num_prompt_tokens += result.num_prompt_tokens
        self.num_completion_tokens += result.num_completion_tokens
        self.num_resumed_tokens += result.num_resumed_tokens
        self.dead_letters_by_type.update(result.dead_letters_by_type)
        self._rows_committed_by[replica_id] += result.num_rows

    def replica_ready(self, replica_id: int, capacity: int, at_s: float) -> None:
        """A replica can work on ``capacity`` sequences at once from now on."""
        self._live[replica_id] = _Reports(capacity, EngineStats(), 0.0, at_s, (at_s, 0.0), (at_s, 0.0))

    def replica_reported(self, replica_id: int, progress: ReplicaProgress, at_s: float) -> None:
        """Keep a ready replica's newest counters."""
        self._live[replica_id].add(at_s, progress)

    def replica_gone(self, replica_id: int, *, died: bool) -> None:
        """Its tokens were generated, whatever became of them; its unfinished rows were not."""
        self.num_replicas_died += died
        reports = self._live.pop(replica_id, None)
        if reports is not None:
            self._gone_prompt_tokens += reports.stats.num_prompt_tokens
            self._gone_completion_tokens += reports.stats.num_completion_tokens
        del self._rows_committed_by[replica_id]

    def replica_stats(self, replica_id: int) -> dict[str, int | float] | None:
        """A ready replica's newest counters as the fields of its ``replica_stats`` event; None before its first."""
        reports = self._live.get(replica_id)
        if reports is None or reports.at_s == reports.earlier[0]:
            return None
        stats = reports.stats
        return {
            **asdict(stats),
            "batch_fill": round(stats.num_active / reports.capacity, 4),
            "kv_use": round(stats.num_places_used / stats.num_places, 4) if stats.num_places else 0.0,
            "idle_s": round(reports.idle_s, 3),
        }

    def _engine_use(self) -> EngineUse:
        live = self._live.values()
        every = [reports.stats for reports in live]
        idle = [share for reports in live if (share := reports.idle_share) is not None]
        num_places = sum(stats.num_places for stats in every)
        num_padding = sum(stats.num_padding_tokens for stats in every)
        num_computed = num_padding + sum(stats.num_prompt_tokens + stats.num_completion_tokens for stats in every)
        return EngineUse(
            num_active=sum(stats.num_active for stats in every),
            capacity=sum(reports.capacity for reports in live),
            kv_use=sum(stats.num_places_used for stats in every) / num_places if num_places else None,
            idle_share=sum(idle) / len(idle) if idle else None,
            padding_share=num_padding / num_computed if num_computed else None,
            num_preemptions=sum(stats.num_preemptions for stats in every),
            num_prefix_hits=sum(stats.num_prefix_hits for stats in every),
        )

    def progress(
        self, at_s: float, elapsed_s: float, num_ready: int, num_starting: int, num_given_up: int
    ) -> RunProgress:
        """The numbers of this moment; call it about once a second, rates are taken between the calls."""
        finished = sum(
            max(0, reports.stats.num_finished // self.samples_per_row - self._rows_committed_by[replica_id])
            for replica_id, reports in self._live.items()
        )
        live = [reports.stats for reports in self._live.values()]
        prompt_tokens = self._gone_prompt_tokens + sum(stats.num_prompt_tokens for stats in live)
        completion_tokens = self._gone_completion_tokens + sum(stats.num_completion_tokens for stats in live)
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
            engines=self._engine_use(),
        )
