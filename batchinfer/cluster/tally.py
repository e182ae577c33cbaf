"""The counting of a run: what units and replicas report, summed into progress and result. Pure."""

from collections import Counter, deque
from dataclasses import asdict, dataclass, field

from batchinfer.cluster.messages import ReplicaProgress, ReplicaStarted
from batchinfer.cluster.queue_messages import QueueLook, ReplicaId, Standing
from batchinfer.engine.engine import EngineStats
from batchinfer.pace import PaceMeter
from batchinfer.records import UnitResult
from batchinfer.telemetry import RATE_WINDOW_S, EngineUse, RateMeter, ReplicaLook, RunProgress

#: Replicas that died are told of for so long, and so many at most.
DEAD_SHOWN_S = 60.0
MAX_DEAD_SHOWN = 8


@dataclass(slots=True)
class _Reports:
    """What one ready replica has told: its newest counters, and those of two earlier looks."""

    started: ReplicaStarted
    newest: ReplicaProgress
    at_s: float
    #: (time, counters): rates are taken from the first, which is replaced by the second as it ages.
    earlier: tuple[float, ReplicaProgress]
    between: tuple[float, ReplicaProgress]

    def add(self, at_s: float, progress: ReplicaProgress) -> None:
        self.newest, self.at_s = progress, at_s
        if at_s - self.between[0] > RATE_WINDOW_S / 2:
            self.earlier, self.between = self.between, (at_s, progress)

    @property
    def stats(self) -> EngineStats:
        return self.newest.stats

    @property
    def capacity(self) -> int:
        return self.started.capacity

    @property
    def idle_share(self) -> float | None:
        share = self._per_second(self.earlier[1].idle_s, self.newest.idle_s)
        return None if share is None else min(1.0, share)

    def look(self, replica_id: ReplicaId, standing: Standing | None) -> ReplicaLook:
        """What there is to tell of it; ``standing`` is its place in the queue."""
        stats, before, newest = self.newest.stats, self.earlier[1].stats, self.newest
        return ReplicaLook(
            replica_id=replica_id,
            state="draining" if standing is not None and standing.state == "draining" else "running",
            node=self.started.node,
            device=self.started.device,
            num_units=standing.num_units if standing is not None else 0,
            prompt_tokens_per_s=self._per_second(before.num_prompt_tokens, stats.num_prompt_tokens),
            completion_tokens_per_s=self._per_second(before.num_completion_tokens, stats.num_completion_tokens),
            batch_fill=stats.num_active / self.capacity if self.capacity else None,
            kv_use=stats.num_places_used / stats.num_places if stats.num_places else None,
            idle_share=self.idle_share,
            num_prompt_tokens=stats.num_prompt_tokens,
            num_completion_tokens=stats.num_completion_tokens,
            num_preemptions=stats.num_preemptions,
            idle_s=newest.idle_s,
            num_storage_retries=newest.num_storage_retries,
            num_journal_flushes=newest.num_journal_flushes,
            journal_s=newest.journal_s,
        )

    def _per_second(self, before: float, now: float) -> float | None:
        span_s = self.at_s - self.earlier[0]
        return max(0.0, (now - before) / span_s) if span_s > 0 else None


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
    num_shared_sequences: int = 0
    num_replicas_died: int = 0
    dead_letters_by_type: Counter[str] = field(default_factory=Counter)
    #: Completions by what is amiss with them.
    quality: Counter[str] = field(default_factory=Counter)
    _live: dict[int, _Reports] = field(default_factory=dict)
    _counted: set[str] = field(default_factory=set)
    _rows_committed_by: Counter[int] = field(default_factory=Counter)
    _gone_prompt_tokens: int = 0
    _gone_completion_tokens: int = 0
    _rates: RateMeter = field(default_factory=RateMeter)
    _pace: PaceMeter = field(default_factory=PaceMeter)
    #: (time, what is told of it) of replicas that died lately.
    _dead: deque[tuple[float, ReplicaLook]] = field(default_factory=lambda: deque(maxlen=MAX_DEAD_SHOWN))
    #: Of units committed and of replicas gone since the last look.
    _unit_seconds: list[float] = field(default_factory=list)
    _last_words: list[ReplicaLook] = field(default_factory=list)

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
        self.num_shared_sequences += result.num_shared_sequences
        self.dead_letters_by_type.update(result.dead_letters_by_type)
        self.quality.update(result.quality)
        # What was shared never comes out of the engine, whose finished sequences these rows are set off against.
        self._rows_committed_by[replica_id] += result.num_rows - result.num_shared_sequences // self.samples_per_row
        self._unit_seconds.append(result.elapsed_s)

    def replica_ready(self, replica_id: int, started: ReplicaStarted, at_s: float) -> None:
        """A replica can work on ``started.capacity`` sequences at once from now on."""
        nothing = ReplicaProgress(EngineStats())
        self._live[replica_id] = _Reports(started, nothing, at_s, (at_s, nothing), (at_s, nothing))

    def replica_reported(self, replica_id: int, progress: ReplicaProgress, at_s: float) -> None:
        """Keep a ready replica's newest counters."""
        self._live[replica_id].add(at_s, progress)

    def replica_gone(self, replica_id: int, at_s: float, died_of: str = "") -> None:
        """Its tokens were generated, whatever became of them; its unfinished rows were not.

        ``died_of`` is empty for one that was not needed any more, or never started.
        """
        reports = self._live.pop(replica_id, None)
        if died_of:
            self.num_replicas_died += 1
            started = reports.started if reports is not None else ReplicaStarted(0, "", "", "", 0.0)
            look = ReplicaLook(replica_id, "dead", started.node, started.device, error=died_of)
            self._dead.append((at_s, look))
        if reports is not None:
            self._last_words.append(reports.look(replica_id, None))
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
            "idle_s": round(reports.newest.idle_s, 3),
            **{f"idle_{cause}_s": round(idle_s, 3) for cause, idle_s in reports.newest.idle_s_by_cause.items()},
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

    def _replicas(self, at_s: float, queue: QueueLook) -> tuple[ReplicaLook, ...]:
        standings = {standing.replica_id: standing for standing in queue.replicas}
        looks = [reports.look(replica_id, standings.get(replica_id)) for replica_id, reports in self._live.items()]
        looks += [ReplicaLook(it.replica_id, "starting") for it in queue.replicas if it.replica_id not in self._live]
        looks += [look for died_at_s, look in self._dead if at_s - died_at_s < DEAD_SHOWN_S]
        return tuple(sorted(looks, key=lambda look: look.replica_id))

    def progress(self, at_s: float, elapsed_s: float, queue: QueueLook) -> RunProgress:
        """The numbers of this moment; call it about once a second, rates are taken between the calls."""
        finished = sum(
            max(0, _num_ended(reports.stats) // self.samples_per_row - self._rows_committed_by[replica_id])
            for replica_id, reports in self._live.items()
        )
        live = [reports.stats for reports in self._live.values()]
        prompt_tokens = self._gone_prompt_tokens + sum(stats.num_prompt_tokens for stats in live)
        completion_tokens = self._gone_completion_tokens + sum(stats.num_completion_tokens for stats in live)
        self._rates.add(at_s, self.num_rows_committed + finished, prompt_tokens, completion_tokens)
        rows_per_s, prompt_tokens_per_s, completion_tokens_per_s = self._rates.per_second()
        self._pace.add(at_s, self.num_rows_committed + finished, queue.num_ready)
        num_done = self.num_rows_before + self.num_rows_committed
        num_left = max(0, self.num_rows - num_done - finished)
        left = self._pace.time_left(num_left, queue.num_ready) if rows_per_s > 0 else None
        unit_seconds, self._unit_seconds = tuple(self._unit_seconds), []
        last_words, self._last_words = tuple(self._last_words), []
        return RunProgress(
            elapsed_s=elapsed_s,
            num_rows=self.num_rows,
            num_rows_committed=num_done,
            num_rows_finished=finished,
            num_units=self.num_units,
            num_units_committed=self.num_units_before + self.num_units_committed,
            num_units_given_up=queue.num_units_given_up,
            num_units_pending=queue.num_units_pending,
            num_units_in_flight=queue.num_units_leased,
            num_dead_letters=self.num_dead_letters_before + self.num_dead_letters,
            num_shared_sequences=self.num_shared_sequences,
            num_prompt_tokens=prompt_tokens,
            num_completion_tokens=completion_tokens,
            num_replicas_ready=queue.num_ready,
            num_replicas_starting=queue.num_starting,
            num_replicas_died=self.num_replicas_died,
            prompt_tokens_per_s=prompt_tokens_per_s,
            completion_tokens_per_s=completion_tokens_per_s,
            eta_s=None if left is None else left.eta_s,
            eta_range_s=None
            if left is None or left.low_s is None or left.high_s is None
            else (left.low_s, left.high_s),
            dead_letters_by_type=dict(self.dead_letters_by_type),
            num_completions=self.num_completions,
            quality=dict(self.quality),
            engines=self._engine_use(),
            replicas=self._replicas(at_s, queue),
            replicas_gone=last_words,
            unit_seconds=unit_seconds,
        )


def _num_ended(stats: EngineStats) -> int:
    """Samples of rows that are at their end: of a conversation, those whose last turn has ended."""
    return stats.num_finished - stats.num_followed
