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
is admitted. The next turn of a conversation whose KV is still there waits where its conversation waited, so what is
said of arrivals is said of conversations then, each of which has so many turns and no more.
"""

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from heapq import heappop, heappush
from itertools import chain
from operator import attrgetter

from batchinfer.engine.arena import Reader
from batchinfer.engine.forecast import OutputLengths
from batchinfer.engine.holders import NO_EXTENT, Phase, Row
from batchinfer.engine.room import Room
from batchinfer.engine.scheduler_limits import Counters, Limits
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
        self._room = Room(limits, holders, lengths or OutputLengths(limits.prior_output_tokens))
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
        self._num_chunked_prefills = 0

    @property
    def counters(self) -> Counters:
        num_running = self._num_running
        return Counters(
            num_waiting=len(self._rows) - num_running,
            num_running=num_running,
            num_places_used=self._room.num_used,
            num_preemptions=self._num_preemptions,
            num_prefixes=self._room.prefixes.num_made,
            num_prefix_hits=self._room.num_prefix_hits,
            num_growths=self._room.num_growths,
            num_copied_places=self._room.num_copied_places,
            num_chunked_prefills=self._num_chunked_prefills,
            num_kept_hits=self._room.num_kept_hits,
            num_kept_tokens=self._room.num_kept_tokens,
            num_kept_evicted=self._room.kept.num_evicted,
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
        num_places = self._room.num_places
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
        *,
        keeps: bool = False,
        continues: int | None = None,
    ) -> int:
        """A sequence waits. Rows of one ``family`` have the same prompt. The prompt must not change afterwards.

        ``num_generated`` tokens of the ``max_new_tokens`` it has already: they are read with its prompt. With ``keeps``
        its KV is kept when it has finished, for the sequence that ``continues`` it: that one reads only what is new.
        Returns what it can be given (see :meth:`fitting`); after so many it is not planned any more. Raises ValueError
        where ``fitting`` does, for an empty prompt, for a sequence that has all its tokens, and for a number in use.
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
        row = Row(sequence, prompt, family, num_tokens, len(prompt) + fitting, turn, keeps=keeps, continues=continues)
        kept = self._room.kept.claim(row)
        if kept is not None:
            row.turn = (*kept.turn[:2], self._num_arrivals)
        self._num_arrivals += 1
        self._rows[sequence] = row
        self._wait(row)
        return fitting

    def finish(self, sequence: int, token_ids: SequenceOf[int] = ()) -> None:
        """It stopped. Its places may be used by the next plan. Raises KeyError for an unknown sequence.

        One that keeps its KV comes with all its tokens, prompt and generated ones; without them nothing is kept.
        """
        row = self._rows[sequence]
        self._room.observe(row.num_generated)
        self._room.leave(row, keeps=row.keeps)
        self._room.kept.complete(sequence, token_ids)
        self._forget(row)

    def abort(self, sequence: int) -> None:
        """It is not wanted any more, wherever it stands; its length tells nothing. Otherwise as ``finish``."""
        self._forget(self._rows[sequence])
        self._room.kept.drop(sequence)

    def drop_kept(self, sequence: int) -> None:
        """No sequence will continue this one, which has finished; nothing happens if its KV is gone already."""
        self._room.kept.drop(sequence)

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
        prefix = self._room.prefixes[holder]
        return prefix.founder.sequence, prefix.length

    def plan(self) -> StepPlan | None:
        """The next step, taken as done; None if nothing can be done before ``add``, ``finish`` or ``abort``."""
        self._begin_step()
        preempted = self._grow()
        decoding = [row for row in self._decode.values() if row.num_tokens <= row.room]
        num_short = len(self._decode) - len(decoding)
        prefilling: list[Reader] = [*self._room.prefixes.in_prefill, *sorted(self._prefill.values(), key=_rank)]
        budget = self.limits.max_step_tokens - len(decoding)
        # Nobody joins while a row is short of places; and a preempted one is prefilled in a later plan.
        if not preempted and num_short == 0:
            prefilling += self._admit(budget - sum(holder.num_unread for holder in prefilling))
        if not decoding and not prefilling:
            return None
        # From here on nothing moves any more.
        copies = self._room.take_copies()
        return StepPlan(copies, self._plan_decode(decoding), self._plan_prefill(prefilling, budget), tuple(preempted))

    def check(self) -> None:
        """Assert that everything derived agrees with the rows and that every place is accounted for. For tests."""
        self._room.check(tuple(self._rows.values()))
        for row in self._rows.values():
            in_arena = row.extent is not NO_EXTENT
            assert in_arena == (row.phase in (Phase.PREFILL, Phase.DECODE)) or row in self._ending
            assert row.phase is not Phase.GONE
            assert row.num_tokens <= row.max_tokens
            assert (row.phase is Phase.COMPLETE) == (row.num_tokens == row.max_tokens)
            for phase, members in self._members.items():
                assert (row.sequence in members) == (row.phase is phase)
        assert sum(len(members) for members in self._members.values()) == self._num_running
        in_line = sorted(row.sequence for _, row in self._line if row.phase is Phase.WAITING)
        assert in_line == sorted(row.sequence for row in self._rows.values() if row.phase is Phase.WAITING)
        assert len(in_line) == self.counters.num_waiting

    def _begin_step(self) -> None:
        self._step += 1
        self._room.begin_step(self._step)
        for row in self._ending:
            # Its last token may be on its way still: what is kept is complete when ``finish`` has told of it.
            self._room.leave(row, keeps=row.keeps)
        self._ending.clear()
        self._room.prefixes.advance()

    def _grow(self) -> list[int]:
        """Room for the KV of every decoding row's newest token, the oldest first; who was preempted for it."""
        preempted: list[int] = []
        needing = [row for row in self._decode.values() if row.num_tokens > row.room]
        for row in sorted(needing, key=_rank):
            while row.phase is Phase.DECODE and not self._room.grow(row):
                victim = self._newest_after(row.rank)
                if victim is None:
                    break
                self._preempt(victim)
                preempted.append(victim.sequence)
        return preempted

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
        self._room.leave(row)

    def _plan_decode(self, rows: list[Row]) -> tuple[DecodeRow, ...]:
        planned = [row.next_decode() for row in rows]
        for row in rows:
            if row.num_tokens == row.max_tokens:
                self._completed(row)
        return tuple(planned)

    def _plan_prefill(self, holders: list[Reader], budget: int) -> tuple[PrefillChunk, ...]:
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

    def _admit(self, budget: int) -> list[Reader]:
        """Start waiting rows in their order while there is room for what they are expected to become.

        Rows whose prefix is still in prefill are passed over: that is a matter of a step or few.
        """
        started: list[Reader] = []
        passed_over: list[Row] = []
        while budget > 0 and self._line and self._num_running < self.limits.max_rows:
            row = heappop(self._line)[1]
            if row.phase is not Phase.WAITING:
                continue
            kept = self._room.kept.of(row)
            prefix = self._room.prefix_for(row) if kept is None else None
            if prefix is not None and not prefix.is_ready:
                passed_over.append(row)
                if prefix.founder is row and not prefix.num_prefilled:
                    started.append(prefix)
                    budget -= prefix.num_unread
                if len(passed_over) < self.limits.max_waiting_scan:
                    continue
                break
            if not self._room.start(row, prefix, kept):
                passed_over.append(row)
                break
            self._started(row)
            started.append(row)
            budget -= row.num_unread
        for row in passed_over:
            heappush(self._line, (row.turn, row))
        return started

    def _started(self, row: Row) -> None:
        if row.rank < 0:
            row.rank = self._num_admitted
            self._num_admitted += 1
        row.num_tokens_when_admitted = row.num_tokens
        row.phase = Phase.PREFILL
        self._prefill[row.sequence] = row

    def _wait(self, row: Row) -> None:
        row.phase = Phase.WAITING
        self._room.prefixes.row_waits(row)
        heappush(self._line, (row.turn, row))

    def _forget(self, row: Row) -> None:
        """It is gone, wherever it stands, and so is the KV that it waited to go on behind."""
        del self._rows[row.sequence]
        if row.phase is Phase.WAITING:
            self._room.prefixes.row_leaves(row)
        else:
            self._room.leave(row)
            self._members[row.phase].pop(row.sequence)
        row.phase = Phase.GONE
        if row.continues is not None:
            self._room.kept.drop(row.continues)
        self._room.prefixes.drop_unwanted()
