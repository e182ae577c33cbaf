"""A device that holds names instead of KV: it carries step plans out and refuses any that would read a wrong place.

The KV of a token depends on all tokens up to it, so what stands in a place is a number that stands for exactly these
tokens. Copies first, then all writes of the step, then all reads, as on a device.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.step_plan import StepPlan

_EMPTY = -1


@dataclass(frozen=True)
class NextTurn:
    """How a conversation goes on: behind which share of the tokens so far, with how many new ones, after how long."""

    share: float = 1.0
    num_new: int = 2
    delay: int = 1
    #: It does not come after all.
    is_dropped: bool = False


@dataclass(frozen=True)
class Job:
    """A sequence to run: where it stops by itself is known to the model alone."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 8
    stop_after: int = 8
    family: Hashable = None
    #: Tokens that an earlier try has generated.
    num_generated: int = 0
    #: Turns to come; each stops where this one does.
    turns: tuple[NextTurn, ...] = ()


@dataclass
class Track:
    """What the model knows of a sequence: its tokens, their names, and how far each step took it."""

    job: Job
    token_limit: int
    arrival: int
    tokens: list[int]
    names: list[int] = field(default_factory=list)
    first_prefill: int | None = None
    num_sampled: int = 0
    finished_at: int | None = None
    preempted_at: list[int] = field(default_factory=list)

    @property
    def stops_at(self) -> int:
        return min(self.job.stop_after, self.token_limit)


class ArenaModel:
    """Scheduler and model device side by side; results are looked at ``lag`` steps late, as the engine does."""

    def __init__(self, limits: Limits, lag: int = 1) -> None:
        self.limits = limits
        self.numbers = count()
        self.scheduler = Scheduler(limits, self.numbers)
        self.lag = lag
        self.tracks: dict[int, Track] = {}
        self.live: dict[int, Track] = {}
        self.arena = [_EMPTY] * limits.num_places
        self.step_number = 0
        self.num_wasted_rows = 0
        self.plans: list[StepPlan] = []
        self._names: dict[tuple[int, int], int] = {}
        self._prefix_sources: dict[int, tuple[int, int]] = {}
        self._stopped: list[tuple[int, int]] = []
        #: (step, sequence) of conversations whose next turn is on its way.
        self.pending: list[tuple[int, int]] = []

    def submit(self, jobs: Iterable[Job], continues: int | None = None) -> list[int]:
        sequences = []
        for job in jobs:
            sequence = next(self.numbers)
            family = ("row", sequence) if job.family is None else job.family
            # As many as an arena of this size could have given it.
            fitting = self.scheduler.fitting(len(job.prompt), job.max_new_tokens)
            num_generated = min(job.num_generated, fitting - 1)
            token_limit = self.scheduler.add(
                sequence,
                job.prompt,
                job.max_new_tokens,
                family,
                num_generated,
                keeps=bool(job.turns),
                continues=continues,
            )
            tokens = [*job.prompt, *([_generated(sequence)] * num_generated)]
            track = Track(job, token_limit, len(self.tracks), tokens, num_sampled=num_generated)
            self._extend(track)
            self.tracks[sequence] = self.live[sequence] = track
            sequences.append(sequence)
        return sequences

    def step(self) -> StepPlan | None:
        """Plan, carry out, then finish what the step ``lag`` steps ago has shown to be at its end."""
        self._submit_next_turns()
        plan = self.scheduler.plan()
        self.step_number += 1
        if plan is not None:
            self.plans.append(plan)
            self._carry_out(plan)
        due = [sequence for step, sequence in self._stopped if step <= self.step_number - self.lag or plan is None]
        self._stopped = [(step, sequence) for step, sequence in self._stopped if sequence not in due]
        for sequence in due:
            if sequence in self.live:
                del self.live[sequence]
                self._finish(sequence)
        assert plan is not None or due or not self.live, "nothing planned, but sequences are left"
        return plan

    def _finish(self, sequence: int) -> None:
        track = self.tracks[sequence]
        track.finished_at = self.step_number
        del track.tokens[len(track.job.prompt) + track.stops_at :]
        self.scheduler.finish(sequence, tuple(track.tokens))
        if track.job.turns:
            self.pending.append((self.step_number + track.job.turns[0].delay, sequence))

    def _submit_next_turns(self) -> None:
        due = [sequence for step, sequence in self.pending if step <= self.step_number]
        self.pending = [it for it in self.pending if it[1] not in due]
        for sequence in due:
            track = self.tracks[sequence]
            turn, *later = track.job.turns
            new = tuple(2_000_000 + sequence * 100 + index for index in range(turn.num_new))
            prompt = (*track.tokens[: round(turn.share * len(track.tokens))], *new)
            if turn.is_dropped or len(prompt) >= self.limits.num_places // self.limits.granule * self.limits.granule:
                self.scheduler.drop_kept(sequence)
                continue
            job = replace(track.job, prompt=prompt, family=None, num_generated=0, turns=tuple(later))
            self.submit([job], continues=sequence)

    def abort(self, sequence: int) -> None:
        del self.live[sequence]
        self.scheduler.abort(sequence)

    def run(self, *, check: bool = True) -> None:
        """Until everything submitted has finished; nothing is left in the arena then."""
        while self.live or self.pending:
            self.step()
            if check:
                self.scheduler.check()
        self.scheduler.plan()
        self.scheduler.check()
        assert self.scheduler.counters.num_places_used == 0
        assert self.scheduler.counters.num_running == self.scheduler.counters.num_waiting == 0

    def _extend(self, track: Track) -> None:
        """Names of the tokens that have none yet."""
        name = track.names[-1] if track.names else _EMPTY
        for token in track.tokens[len(track.names) :]:
            name = self._names.setdefault((name, token), len(self._names))
            track.names.append(name)

    def _sample(self, sequence: int) -> None:
        track = self.tracks[sequence]
        track.tokens.append(_generated(sequence))
        self._extend(track)
        track.num_sampled += 1
        if track.num_sampled == track.stops_at:
            self._stopped.append((self.step_number, sequence))
        elif track.num_sampled > track.stops_at:
            self.num_wasted_rows += 1
        assert track.num_sampled <= track.token_limit, "planned beyond its limit"

    def _carry_out(self, plan: StepPlan) -> None:
        limits, arena = self.limits, self.arena
        assert 0 < plan.num_tokens <= limits.max_step_tokens
        assert len(plan.decode) + sum(chunk.samples for chunk in plan.prefill) <= limits.max_rows
        planned = [row.sequence for row in plan.decode] + [chunk.holder for chunk in plan.prefill]
        assert len(set(planned)) == len(planned), "a holder is planned twice in one step"
        for sequence in plan.preempted:
            assert sequence not in planned, "preempted and planned in one step"
            track = self.tracks[sequence]
            track.preempted_at.append(track.num_sampled)
            assert track.preempted_at[-2:-1] != [track.num_sampled], "preempted twice without a token between"

        sources = [arena[copy.source : copy.source + copy.num_tokens] for copy in plan.copies]
        targets: set[int] = set()
        for copy, names in zip(plan.copies, sources, strict=True):
            places = range(copy.target, copy.target + copy.num_tokens)
            assert targets.isdisjoint(places), "two copies write one place"
            targets.update(places)
            arena[copy.target : copy.target + copy.num_tokens] = names

        reads: list[tuple[int, int, int, list[int]]] = []
        written: set[int] = set()

        def write(holder: int, names: list[int], offset: int, start: int, stop: int, prefix: tuple[int, int]) -> None:
            prefix_offset, prefix_length = prefix
            place = offset + start - prefix_length
            places = range(place, place + stop - start)
            assert 0 <= place < place + stop - start <= limits.num_places
            assert start >= prefix_length
            assert written.isdisjoint(places), "two holders write one place in one step"
            written.update(places)
            arena[place : place + stop - start] = names[start:stop]
            reads.append((holder, prefix_offset, 0, names[:prefix_length]))
            reads.append((holder, offset, prefix_length, names[prefix_length:stop]))

        for row in plan.decode:
            track = self.tracks[row.sequence]
            assert row.sequence in self.live, "planned after its end"
            assert row.position == len(track.tokens) - 1, "a decode row must read the newest token"
            prefix = (row.prefix_offset, row.prefix_length)
            write(row.sequence, track.names, row.offset, row.position, row.position + 1, prefix)
        filled_now: set[int] = set()
        for chunk in plan.prefill:
            sequence, length = self.scheduler.holder_tokens(chunk.holder)
            assert sequence in self.live, "a prefix must be filled from a sequence in hand"
            track = self.tracks[sequence]
            if sequence == chunk.holder:
                assert not chunk.samples or chunk.stop == len(track.tokens)
                track.first_prefill = self.step_number if track.first_prefill is None else track.first_prefill
            else:
                assert chunk.stop <= length
                filled_now.update(range(chunk.offset, chunk.offset + chunk.stop))
            prefix = (chunk.prefix_offset, chunk.prefix_length)
            write(chunk.holder, track.names, chunk.offset, chunk.start, chunk.stop, prefix)
        for holder, offset, position, names in reads:
            assert arena[offset : offset + len(names)] == names, f"holder {holder} reads wrong KV from {position} on"
        used = [(row.prefix_offset, row.prefix_length) for row in plan.decode]
        used += [(chunk.prefix_offset, chunk.prefix_length) for chunk in plan.prefill]
        assert not any(length and offset in filled_now for offset, length in used), "a prefix is filled and used"

        for row in plan.decode:
            self._sample(row.sequence)
        for chunk in plan.prefill:
            if chunk.samples:
                self._sample(chunk.holder)


def _generated(sequence: int) -> int:
    """The token that a sequence generates over and over: no prompt's and no other sequence's."""
    return 1_000_000 + sequence


def random_turns(dice: Random, max_turns: int) -> tuple[NextTurn, ...]:
    """Mostly behind all tokens so far, now and then behind some or none of them; the last one may not come."""
    return tuple(
        NextTurn(
            share=dice.choice((1.0, 1.0, 1.0, dice.random(), 0.0)),
            num_new=dice.randint(1, 6),
            delay=dice.choice((0, 1, 1, 2, 9)),
            is_dropped=dice.random() < 0.1,
        )
        for _ in range(dice.randint(0, max_turns))
    )


def random_jobs(
    dice: Random, num_jobs: int, *, max_prompt: int, max_new: int, shared: int = 0, max_turns: int = 0
) -> list[Job]:
    """Ragged prompts, some from templates of up to ``shared`` tokens, some in families of up to four samples.

    Every fifth or so begins with tokens of an earlier try; conversations have up to ``max_turns`` turns more.
    """
    templates = [tuple(dice.randrange(50) for _ in range(dice.randint(1, shared))) for _ in range(3)] if shared else []
    jobs: list[Job] = []
    while len(jobs) < num_jobs:
        own = tuple(dice.randrange(50) for _ in range(dice.randint(1, max_prompt)))
        prompt = dice.choice(templates) + own if templates and dice.random() < 0.6 else own
        num_samples = dice.randint(2, 4) if shared and dice.random() < 0.25 else 1
        for _ in range(min(num_samples, num_jobs - len(jobs))):
            limit = dice.randint(1, max_new)
            family = ("family", len(jobs) // 4, prompt) if num_samples > 1 else None
            stop_after = min(limit, 1 + int(dice.expovariate(3 / max_new)))
            num_generated = dice.randrange(stop_after) if dice.random() < 0.2 else 0
            turns = random_turns(dice, max_turns) if max_turns else ()
            jobs.append(Job(prompt, limit, stop_after, family, num_generated, turns))
    return jobs
