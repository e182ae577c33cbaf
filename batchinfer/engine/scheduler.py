"""The continuous engine's decisions: who prefills, who decodes, who grows, who is preempted.

Pure Python over integers: no torch, no token values beyond comparing prompts, no knowledge of where a sequence will
stop. Each call of ``plan`` decides one step and takes it as done, so that the engine can prepare step i + 1 while
the device runs step i:

- The device executes plans in order. Places freed by ``finish`` or by a preemption may be written by the next plan.
- The newest token of a row may still be in flight when a plan is made; only its position is spoken of. A row that
  decodes beyond the stop found in flight costs one row of one step.
- A preempted sequence is prefilled again, prompt and generated tokens, in a later plan than the one that
  preempted it: by then all its tokens are on the host.

Why no sequence waits forever. Rows have a rank, given at their first admission and kept. A row is preempted only
for one of lower rank, so the lowest never is, and all others give way to it. A row that was preempted must have come
to a new token before it can be preempted again, which it does with the places it is admitted with. Waiting rows
are admitted in a fixed order in which fewer than ``max_waiting_scan`` later arrivals overtake one (and those that
start while its shared prefix is in prefill, which is given up once at most); while a row is short of places, nobody
is admitted.
"""

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from heapq import heappop, heappush
from itertools import chain
from operator import attrgetter

from batchinfer.engine.arena import Arena, Holder
from batchinfer.engine.forecast import Forecast, OutputLengths
from batchinfer.engine.holders import NO_EXTENT, Phase, Prefix, Row
from batchinfer.engine.prefixes import PrefixIndex
from batchinfer.engine.scheduler_limits import Counters, Limits
from batchinfer.engine.shared_prefixes import SharedPrefixes
from batchinfer.engine.step_plan import DecodeRow, PrefillChunk, StepPlan

_rank = attrgetter("rank")


class Scheduler:
    """Sequences go in by number, step plans come out.

    ``holders`` gives numbers to shared prefixes; the engine takes its sequences' numbers from the same iterator,
    so that no two holders are called alike. ``lengths`` are what outputs were like so far; without them the limits'
    prior is all that is known.
    """

    def __init__(self, limits: Limits, holders: Iterator[int], lengths: OutputLengths | None = None) -> None:
        self.limits = limits
        self._arena = Arena(limits.num_places, limits.granule)
        index = PrefixIndex(limits.prefix_block, limits.min_prefix_tokens, limits.min_prefix_rows)
        self._prefixes = SharedPrefixes(index, self._arena, holders)
        self._forecast = Forecast(lengths or OutputLengths(limits.prior_output_tokens))
        self._reserved = int(limits.reserve * self._arena.num_places)
        self._rows: dict[int, Row] = {}
        self._line: list[tuple[tuple[int, int, int], Row]] = []
        self._prefill: dict[int, Row] = {}
        self._decode: dict[int, Row] = {}
        self._complete: dict[int, Row] = {}
        self._ending: list[Row] = []
        self._step = 0
        self._num_arrivals = 0
        self._num_admitted = 0
        self._num_preemptions = 0
        self._num_prefix_hits = 0
        self._num_growths = 0
        self._num_copied_places = 0
        self._num_chunked_prefills = 0

    @property
    def counters(self) -> Counters:
        num_running = self._num_running
        return Counters(
            num_waiting=len(self._rows) - num_running,
            num_running=num_running,
            num_places_used=self._arena.num_used,
            num_preemptions=self._num_preemptions,
            num_prefixes=self._prefixes.num_made,
            num_prefix_hits=self._num_prefix_hits,
            num_growths=self._num_growths,
            num_copied_places=self._num_copied_places,
            num_chunked_prefills=self._num_chunked_prefills,
        )

    @property
    def _num_running(self) -> int:
        return len(self._prefill) + len(self._decode) + len(self._complete)

    @property
    def _members(self) -> dict[Phase, dict[int, Row]]:
        return {Phase.PREFILL: self._prefill, Phase.DECODE: self._decode, Phase.COMPLETE: self._complete}

    def fitting(self, num_prompt_tokens: int, max_new_tokens: int) -> int:
        """How many tokens such a sequence can be given: ``max_new_tokens``, or less where its KV would outgrow the
        arena even if it had it alone. Raises ValueError if the prompt and one more token do not fit.
        """
        num_places = self._arena.num_places
        if num_prompt_tokens + 1 > num_places:
            raise ValueError(
                f"a prompt of {num_prompt_tokens} tokens and one new token need {num_prompt_tokens + 1} places, but "
                f"the KV cache has {num_places}; give it more memory or shorten the prompt"
            )
        # The last token a sequence may have needs no place: nothing is read after it.
        return min(max_new_tokens, num_places + 1 - num_prompt_tokens)

    def add(
        self,
        sequence: int,
        prompt: SequenceOf[int],
        max_new_tokens: int,
        family: Hashable,
        num_generated: int = 0,
    ) -> int:
        """A sequence waits. Rows of one ``family`` have the same prompt. The prompt must not change afterwards.

        ``num_generated`` tokens of the ``max_new_tokens`` it has already: they are read with its prompt. Returns what
        it can be given (see :meth:`fitting`); after so many it is not planned any more. Raises ValueError where
        ``fitting`` does, for an empty prompt, for a sequence that has all its tokens, and for a number in use.
        """
        if not prompt or max_new_tokens < 1:
            raise ValueError(
                f"sequence {sequence}: {len(prompt)} prompt tokens and {max_new_tokens} new ones asked for"
            )
        fitting = self.fitting(len(prompt), max_new_tokens)
        if num_generated >= fitting:
            raise ValueError(f"sequence {sequence} has {num_generated} tokens of the {fitting} it can have")
        if sequence in self._rows:
            raise ValueError(f"sequence {sequence} was added already")
        num_tokens = len(prompt) + num_generated
        turn = (self._num_arrivals // self.limits.max_waiting_scan, -num_tokens, self._num_arrivals)
        self._num_arrivals += 1
        row = Row(sequence, prompt, family, num_tokens, len(prompt) + fitting, turn)
        self._rows[sequence] = row
        self._wait(row)
        return fitting

    def finish(self, sequence: int) -> None:
        """It stopped. Its places may be used by the next plan. Raises KeyError for an unknown sequence."""
        self._forecast.observe(self._rows[sequence].num_generated)
        self.abort(sequence)

    def abort(self, sequence: int) -> None:
        """It is not wanted any more, wherever it stands; its length tells nothing. Otherwise as ``finish``."""
        row = self._rows.pop(sequence)
        if row.phase is Phase.WAITING:
            self._prefixes.row_leaves(row)
        else:
            self._leave_arena(row)
            self._members[row.phase].pop(sequence)
        row.phase = Phase.GONE
        self._prefixes.drop_unwanted()

    def allow(self, max_rows: int, max_step_tokens: int) -> None:
        """From the next plan on so many rows and tokens a step; not fewer than before, as rows may be running."""
        self.limits = replace(self.limits, max_rows=max_rows, max_step_tokens=max_step_tokens)

    def holder_tokens(self, holder: int) -> tuple[int, int]:
        """(sequence, length): the holder's tokens are the first ``length`` of this sequence, which is in hand.

        For holders that the newest plan prefills; a token that it samples is counted already. Raises KeyError for
        holders that are gone.
        """
        row = self._rows.get(holder)
        if row is not None:
            return holder, row.num_tokens
        prefix = self._prefixes[holder]
        return prefix.founder.sequence, prefix.length

    def plan(self) -> StepPlan | None:
        """The next step, taken as done; None if nothing can be done before ``add``, ``finish`` or ``abort``."""
        self._begin_step()
        preempted = self._grow()
        decoding = [row for row in self._decode.values() if row.num_tokens <= row.room]
        num_short = len(self._decode) - len(decoding)
        prefilling: list[Holder] = [*self._prefixes.in_prefill, *sorted(self._prefill.values(), key=_rank)]
        budget = self.limits.max_step_tokens - len(decoding)
        # Nobody joins while a row is short of places; and a preempted one is prefilled in a later plan.
        if not preempted and num_short == 0:
            prefilling += self._admit(budget - sum(holder.num_unread for holder in prefilling))
        if not decoding and not prefilling:
            return None
        # From here on nothing moves any more.
        copies = self._arena.take_copies()
        self._num_copied_places += sum(copy.num_tokens for copy in copies)
        return StepPlan(copies, self._plan_decode(decoding), self._plan_prefill(prefilling, budget), tuple(preempted))

    def check(self) -> None:
        """Assert that everything derived agrees with the rows and that every place is accounted for. For tests."""
        self._arena.check()
        users: dict[int, int] = {}
        for row in self._rows.values():
            if row.prefix is not None:
                assert self._prefixes[row.prefix.holder] is row.prefix
                users[row.prefix.holder] = users.get(row.prefix.holder, 0) + 1
            in_arena = row.extent is not NO_EXTENT
            assert in_arena or row.prefix is None
            assert in_arena == (row.phase in (Phase.PREFILL, Phase.DECODE)) or row in self._ending
            assert row.phase is not Phase.GONE
            assert not in_arena or row.room == row.prefix_length + row.extent.capacity
            assert row.num_tokens <= row.max_tokens
            assert (row.phase is Phase.COMPLETE) == (row.num_tokens == row.max_tokens)
            for phase, members in self._members.items():
                assert (row.sequence in members) == (row.phase is phase)
        self._prefixes.check(users)
        own_places = sum(row.extent.capacity for row in self._rows.values())
        assert self._arena.num_used == own_places + self._prefixes.num_places
        assert sum(len(members) for members in self._members.values()) == self._num_running
        in_line = sorted(row.sequence for _, row in self._line if row.phase is Phase.WAITING)
        assert in_line == sorted(row.sequence for row in self._rows.values() if row.phase is Phase.WAITING)
        assert len(in_line) == self.counters.num_waiting

    def _begin_step(self) -> None:
        self._step += 1
        self._forecast.advance(self._step)
        for row in self._ending:
            self._leave_arena(row)
        self._ending.clear()
        self._prefixes.advance()

    def _grow(self) -> list[int]:
        """Room for the KV of every decoding row's newest token, the oldest first; who was preempted for it."""
        preempted: list[int] = []
        needing = [row for row in self._decode.values() if row.num_tokens > row.room]
        for row in sorted(needing, key=_rank):
            while row.phase is Phase.DECODE and not self._grow_row(row):
                if self._prefixes.evict():
                    continue
                victim = self._newest_after(row.rank)
                if victim is None:
                    break
                self._preempt(victim)
                preempted.append(victim.sequence)
        return preempted

    def _grow_row(self, row: Row) -> bool:
        """With headroom if there are places for it, else as little as it takes; False if not even that is free."""
        num_places = row.own_places(self.limits.growth_tokens)
        if not self._arena.can_grow(row, num_places):
            num_places = row.own_places(0)
            if not self._arena.can_grow(row, num_places):
                return False
        self._arena.grow(row, num_places)
        self._num_growths += 1
        return True

    def _newest_after(self, rank: int) -> Row | None:
        rows = [
            row
            for row in chain(self._prefill.values(), self._decode.values())
            if row.rank > rank and row.is_preemptable
        ]
        return max(rows, key=_rank, default=None)

    def _preempt(self, row: Row) -> None:
        self._num_preemptions += 1
        self._members[row.phase].pop(row.sequence)
        row.was_preempted = True
        row.turn = (-1, row.rank, 0)
        # It waits before it leaves its prefix, so that the prefix, which it will want again, is not dropped.
        self._wait(row)
        self._leave_arena(row)

    def _plan_decode(self, rows: list[Row]) -> tuple[DecodeRow, ...]:
        planned = [row.next_decode() for row in rows]
        for row in rows:
            if row.num_tokens == row.max_tokens:
                self._completed(row)
        return tuple(planned)

    def _plan_prefill(self, holders: list[Holder], budget: int) -> tuple[PrefillChunk, ...]:
        """What was in prefill before goes first, and prefixes before rows, as rows wait for them."""
        chunks: list[PrefillChunk] = []
        for holder in holders:
            if not budget:
                break
            self._num_chunked_prefills += not holder.num_held and holder.num_unread > budget
            chunk = holder.next_chunk(budget)
            budget -= chunk.num_tokens
            chunks.append(chunk)
            if chunk.samples:
                row = self._prefill.pop(chunk.holder)
                row.phase = Phase.DECODE
                self._decode[row.sequence] = row
                if row.num_tokens == row.max_tokens:
                    self._completed(row)
        return tuple(chunks)

    def _completed(self, row: Row) -> None:
        """Its places are in use until this step has run: they are given back with the next plan."""
        del self._decode[row.sequence]
        row.phase = Phase.COMPLETE
        self._complete[row.sequence] = row
        self._ending.append(row)

    def _admit(self, budget: int) -> list[Holder]:
        """Start waiting rows in their order while there is room for what they are expected to become.

        Rows whose prefix is still in prefill are passed over: that is a matter of a step or few.
        """
        started: list[Holder] = []
        passed_over: list[Row] = []
        while budget > 0 and self._line and self._num_running < self.limits.max_rows:
            row = heappop(self._line)[1]
            if row.phase is not Phase.WAITING:
                continue
            prefix = self._prefix_for(row)
            if prefix is not None and not prefix.is_ready:
                passed_over.append(row)
                if prefix.founder is row and not prefix.num_prefilled:
                    started.append(prefix)
                    budget -= prefix.num_unread
                if len(passed_over) < self.limits.max_waiting_scan:
                    continue
                break
            if not self._start(row, prefix):
                passed_over.append(row)
                break
            started.append(row)
            budget -= row.num_unread
        for row in passed_over:
            heappush(self._line, (row.turn, row))
        return started

    def _prefix_for(self, row: Row) -> Prefix | None:
        """The prefix to share, made if it is missing and there is room for it."""
        stem = self._prefixes.best_stem(row)
        if stem is None:
            return None
        if stem.holder is not None:
            return self._prefixes[stem.holder]
        if not self._is_affordable(self._forecast.peak(), stem.length):
            return None
        return self._prefixes.make(stem, row)

    def _is_affordable(self, expected_places: int, num_more: int) -> bool:
        """Whether ``num_more`` places can go now, and what the running rows are expected to need will fit then."""
        capacity = self._arena.round_up(num_more)
        num_places = max(self._arena.num_used, self._prefixes.num_places + expected_places) + capacity
        return num_places <= self._arena.num_places - self._reserved

    def _start(self, row: Row, prefix: Prefix | None) -> bool:
        """Give a waiting row its extent and its rank; False (and no change) if it is not expected to fit.

        With nothing but prefixes in the arena a row always starts: beside its own prefix it has room for its full
        length (see ``SharedPrefixes.best_stem``), and without one ``add`` refused it if it could not fit.
        """
        row.prefix = prefix
        num_places = row.own_places(self.limits.growth_tokens)
        on_average = row.own_places(self.limits.growth_tokens // 2)
        self._forecast.add(row.sequence, self._step, on_average, row.num_generated, row.max_tokens - row.num_tokens)
        if not (self._is_affordable(self._forecast.peak(), 0) and self._is_affordable(0, num_places)):
            if not self._only_prefixes_are_held:
                self._forecast.remove(row.sequence)
                row.prefix = None
                return False
            num_places = row.own_places(1)
            while self._arena.round_up(num_places) > self._arena.num_free:
                self._prefixes.evict(kept=prefix)
        self._prefixes.row_leaves(row)
        if prefix is not None:
            self._prefixes.use(prefix)
            self._num_prefix_hits += 1
        if row.rank < 0:
            row.rank = self._num_admitted
            self._num_admitted += 1
        self._arena.settle(row, num_places)
        row.num_prefilled = row.prefix_length
        row.num_tokens_when_admitted = row.num_tokens
        row.phase = Phase.PREFILL
        self._prefill[row.sequence] = row
        return True

    @property
    def _only_prefixes_are_held(self) -> bool:
        """No row owns places, and none is about to use a prefix still in prefill."""
        return self._arena.num_used == self._prefixes.num_places and not self._prefixes.in_prefill

    def _wait(self, row: Row) -> None:
        row.phase = Phase.WAITING
        self._prefixes.row_waits(row)
        heappush(self._line, (row.turn, row))

    def _leave_arena(self, row: Row) -> None:
        """Give places and prefix back; may be repeated."""
        if row.extent is NO_EXTENT:
            return
        self._arena.release(row)
        self._forecast.remove(row.sequence)
        prefix, row.prefix = row.prefix, None
        if prefix is not None:
            self._prefixes.leave(prefix)
