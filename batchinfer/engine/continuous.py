"""The fast engine: sequences join and leave at every step, prompts are read beside tokens being written.

The scheduler decides a step in integers (``scheduler``), the decoder carries it out over one flat KV arena
(``decoder``, ``kv_cache``), the sampler draws (``sampler``); this file joins them. On a GPU the host works one step
ahead: while the device runs step i, step i + 1 is planned, and its decode rows take their newest tokens from the
device. So a stop is seen one step late, and the token drawn after it is thrown away. Where a row has a grammar, what
it may draw in step i + 1 depends on its token of step i: that is read as soon as the forward pass of step i + 1 has
been launched, and the masks are made while it runs.

Running out of memory costs work, never results: every sequence waits again with the tokens it has, in a new scheduler
with smaller steps, and is read anew. What the arena holds then is nobody's.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import torch

from batchinfer.engine.decoder import Decoder
from batchinfer.engine.engine import Decode, EngineStats, Generation, Partial, Sequence
from batchinfer.engine.forecast import OutputLengths
from batchinfer.engine.graphs import GraphedDecoder
from batchinfer.engine.kv_cache import KvCache
from batchinfer.engine.out_of_memory import MEMORY_ERRORS, does_not_fit, is_out_of_memory
from batchinfer.engine.row import Row, begin, failure
from batchinfer.engine.sampler import Drawn, Sampler
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.scheduler_limits import Counters, Limits
from batchinfer.engine.step_limits import StepLimits
from batchinfer.engine.step_plan import StepPlan
from batchinfer.engine.step_tensors import build
from batchinfer.engine.token_masks import TokenMasks
from batchinfer.engine.upload import upload

if TYPE_CHECKING:
    from batchinfer.engine.grammar import Grammars

#: So many steps of one token that fail without one between that fits: then it is the device, whatever the sequence.
_MAX_LONE_FAILURES = 8


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched: which sequences get a token from it, and the tokens on their way."""

    sequences: tuple[int, ...]
    drawn: Drawn


class ContinuousEngine:
    """``Engine`` over the lean decoder; see the module's text.

    Greedy completions equal ``padded``'s token for token in float32. A sampled token depends on its logits and on
    (seed, row_id, sample, position) only.
    """

    def __init__(
        self,
        decoder: Decoder | GraphedDecoder,
        kv: KvCache,
        limits: Limits,
        *,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        decode: Decode | None = None,
        grammars: "Grammars | None" = None,
        num_steps_ahead: int | None = None,
    ) -> None:
        """``grammars`` is needed by sequences with a schema or pattern only.

        ``num_steps_ahead`` is how many launched steps may be unread: 1 on a GPU and 0 on a CPU unless given."""
        self._decoder = decoder
        self._kv = kv
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self._decode = decode
        self._grammars = grammars
        self._num_steps_ahead = num_steps_ahead if num_steps_ahead is not None else int(decoder.device.type == "cuda")
        self._numbers = count()
        self._lengths = OutputLengths(limits.prior_output_tokens)
        self._step_limits = StepLimits(limits.max_rows, limits.max_step_tokens)
        self._scheduler = Scheduler(limits, self._numbers, self._lengths)
        #: Steps of one token that failed since the last step that fitted; and where each sequence last failed in one.
        self._num_lone_failures = 0
        self._failed_alone_at: dict[int, int] = {}
        #: Of the schedulers before a lack of memory.
        self._earlier: Counters | None = None
        self._sampler = Sampler(decoder.config.vocab_size, decoder.device)
        #: Sequences in the sampler, in its order.
        self._sampling: list[int] = []
        self._rows: dict[int, Row] = {}
        self._number_of: dict[tuple[str, int], int] = {}
        #: Of sequences that have ended and whose next turn is to come: the scheduler may have kept their KV.
        self._turn_before: dict[tuple[str, int], int] = {}
        self._flights: list[_Flight] = []
        #: Ends that no step has returned yet.
        self._ended: list[Generation] = []
        self._stats = EngineStats(num_places=limits.num_places)

    @property
    def capacity(self) -> int:
        return self._limits.max_rows

    @property
    def num_unfinished(self) -> int:
        return len(self._rows) + len(self._ended)

    @property
    def counters(self) -> Counters:
        """What the scheduler counts: preemptions, prefixes, growths, places."""
        counters = self._scheduler.counters
        return counters if self._earlier is None else counters.after(self._earlier)

    @property
    def limits(self) -> Limits:
        """What a step may carry now: less than was given for a while after the device ran out of memory."""
        return self._scheduler.limits

    def submit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._submit_one(sequence)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        plan = self._scheduler.plan() if self._rows else None
        out_of_memory = False
        try:
            if plan is not None:
                self._launch(plan)
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            # Handled below: until this clause ends, the traceback keeps the failed step's tensors alive.
            out_of_memory = True
        if plan is not None and out_of_memory:
            self._retreat(plan)
            plan = None
        elif plan is not None:
            self._num_lone_failures = 0
            if self._step_limits.step_fitted():
                self._scheduler.allow(self._step_limits.max_rows, self._step_limits.max_step_tokens)
        # With nothing launched, what is in flight is all there is to learn.
        allowed = self._num_steps_ahead if plan is not None else 0
        while len(self._flights) > allowed:
            self._collect(self._flights.pop(0))
        finished, self._ended = self._ended, []
        self._count(plan, finished)
        return finished

    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        unwanted = set(sequence_ids)
        self._ended = [end for end in self._ended if end.sequence.sequence_id not in unwanted]
        for sequence_id in unwanted:
            self._drop_kept(sequence_id)
            number = self._number_of.get(sequence_id)
            if number is not None:
                self._forget(number)
                self._scheduler.abort(number)

    def in_progress(self) -> list[Partial]:
        """Tokens still on their way from the device are not among them."""
        return [row.partial() for row in self._rows.values() if row.generated]

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._rows.clear()
        self._number_of.clear()
        self._turn_before.clear()
        self._flights.clear()
        self._ended.clear()
        self._sampling.clear()
        self._sampler = Sampler(0, self._decoder.device)
        empty = self._kv.keys_LNKD.new_empty(0)
        self._kv = KvCache(empty, empty)

    def _submit_one(self, sequence: Sequence) -> None:
        self._take_in(sequence)
        if sequence.sequence_id not in self._number_of:
            # It has ended already; what was kept for it is nobody's.
            self._drop_kept(sequence.sequence_id)

    def _take_in(self, sequence: Sequence) -> None:
        number = next(self._numbers)
        row = begin(
            sequence,
            number,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._decoder.config.vocab_size,
            max_model_len=self._max_model_len,
            decode=self._decode,
            grammars=self._grammars,
        )
        if isinstance(row, Generation):
            self._ended.append(row)
            return
        prompt = sequence.prompt
        try:
            row.max_new_tokens = self._scheduler.fitting(len(prompt.token_ids), row.max_new_tokens)
        except ValueError as error:
            self._ended.append(failure(sequence, "out_of_memory", str(error)))
            return
        if row.max_new_tokens < len(sequence.forced):
            limit = (
                f"a prompt of {len(prompt.token_ids)} tokens and {len(sequence.forced)} given ones outgrow the KV cache"
            )
            self._ended.append(failure(sequence, "out_of_memory", f"{limit}; give it more memory"))
            return
        if row.max_remaining < 1:
            # An earlier try had a larger KV cache. Its tokens are right, this one just cannot add to them.
            self._ended.append(row.generation("length"))
            return
        self._wait(number, row)
        self._rows[number] = row
        self._number_of[sequence.sequence_id] = number

    def _wait(self, number: int, row: Row) -> None:
        sequence = row.sequence
        self._scheduler.add(
            number,
            sequence.prompt.token_ids,
            row.max_new_tokens,
            sequence.prompt_id,
            len(row.generated),
            keeps=sequence.has_next_turn,
            continues=self._turn_before.pop(sequence.sequence_id, None),
        )

    def _drop_kept(self, sequence_id: tuple[str, int]) -> None:
        number = self._turn_before.pop(sequence_id, None)
        if number is not None:
            self._scheduler.drop_kept(number)

    def _launch(self, plan: StepPlan) -> None:
        """Give the step to the device; on return it may still be running."""
        sequences = (
            *(row.sequence for row in plan.decode),
            *(chunk.holder for chunk in plan.prefill if chunk.samples),
        )
        step = build(plan, self._tokens_of, self._decoder.device, self._newest_tokens(plan))
        logits_SV = self._decoder.forward(step, self._kv)
        self._count_prompts(plan)
        if not sequences:
            return
        self._align_sampler(sequences)
        self._flights.append(_Flight(sequences, self._sampler.launch(logits_SV, self._masks(sequences))))

    def _masks(self, sequences: SequenceOf[int]) -> TokenMasks | None:
        """What those of the step's rows that have a grammar may take; first reads the steps in flight for them."""
        if self._grammars is None or not any(self._rows[number].grammar is not None for number in sequences):
            return None
        while self._flights:
            self._collect(self._flights.pop(0))
        # Rows that have just ended draw a token like any other, which nobody reads.
        steered = [
            (place, row.grammar)
            for place, number in enumerate(sequences)
            if (row := self._rows.get(number)) is not None and row.grammar is not None
        ]
        return self._grammars.masks(steered) if steered else None

    def _retreat(self, plan: StepPlan) -> None:
        """The device had no memory for this plan: begin anew with every sequence's tokens, in smaller steps.

        A step of one token cannot be made smaller. If it fails again at the same position of the same sequence, and
        others fitted between, the sequence ends with an error. Raises torch.OutOfMemoryError if nothing fits any more.
        """
        tokens = [(row.sequence, row.position) for row in plan.decode]
        tokens += [(chunk.holder, chunk.start) for chunk in plan.prefill]
        number, position = self._sequence_of(tokens[0][0]), tokens[0][1]
        # What was launched before is done, or will be: its tokens count.
        for flight in self._flights:
            self._collect(flight)
        self._flights.clear()
        if plan.num_tokens == 1 and number is not None and number in self._rows:
            self._fail_alone(number, position)
        self._step_limits.step_failed(plan.num_tokens)
        self._sampler = Sampler(self._decoder.config.vocab_size, self._decoder.device)
        self._sampling = []
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        limits = replace(
            self._limits, max_rows=self._step_limits.max_rows, max_step_tokens=self._step_limits.max_step_tokens
        )
        counters = self.counters
        self._earlier = replace(counters, num_preemptions=counters.num_preemptions + counters.num_running)
        # With the places goes what was kept in them.
        self._turn_before.clear()
        self._scheduler = Scheduler(limits, self._numbers, self._lengths)
        for number, row in self._rows.items():
            self._wait(number, row)

    def _sequence_of(self, holder: int) -> int | None:
        """Whose tokens a holder of the newest plan has; None if that has ended since."""
        try:
            return self._scheduler.holder_tokens(holder)[0]
        except KeyError:
            return None

    def _fail_alone(self, number: int, position: int) -> None:
        if not self._num_lone_failures and self._failed_alone_at.get(number) == position:
            self._ended.append(does_not_fit(self._rows[number]))
            self._forget(number)
            return
        self._failed_alone_at[number] = position
        self._num_lone_failures += 1
        if self._num_lone_failures == _MAX_LONE_FAILURES:
            raise torch.OutOfMemoryError(
                f"device {self._decoder.device} has no memory for a step of one token beside the KV cache of "
                f"{self._kv.num_places:,} places: something else takes it; to leave more, lower engine.max_batch_tokens"
            )

    def _newest_tokens(self, plan: StepPlan) -> torch.Tensor | None:
        """The decode rows' newest tokens on the device; None when the host knows them all."""
        if not self._flights or not plan.decode:
            return None
        flight = self._flights[-1]
        place_of = {number: index for index, number in enumerate(flight.sequences)}
        places = [place_of.get(row.sequence, -1) for row in plan.decode]
        places_R = upload(places, torch.long, self._decoder.device)
        newest_R = flight.drawn.tokens[places_R.clamp(min=0)]
        if min(places) < 0:
            # Rows that sat out the step in flight: theirs are on the host.
            known = [self._rows[row.sequence].generated[-1] for row in plan.decode]
            newest_R = torch.where(places_R < 0, upload(known, torch.long, self._decoder.device), newest_R)
        return newest_R

    def _tokens_of(self, holder: int, start: int, stop: int) -> SequenceOf[int]:
        """Tokens of a sequence, or of a prefix, which are those of the sequence it was found in."""
        row = self._rows.get(holder)
        if row is None:
            row = self._rows[self._scheduler.holder_tokens(holder)[0]]
        prompt = row.sequence.prompt.token_ids
        num_prompt_tokens = len(prompt)
        if stop <= num_prompt_tokens:
            return prompt[start:stop]
        generated = row.generated[max(0, start - num_prompt_tokens) : stop - num_prompt_tokens]
        return [*prompt[start:], *generated] if start < num_prompt_tokens else generated

    def _align_sampler(self, sequences: SequenceOf[int]) -> None:
        """Make the sampler's rows those of the step, in its order; those who sat it out leave."""
        wanted = list(sequences)
        if self._sampling == wanted:
            return
        place_of = {number: index for index, number in enumerate(self._sampling)}
        known = [number for number in wanted if number in place_of]
        new = [number for number in wanted if number not in place_of]
        self._sampler.select([place_of[number] for number in known])
        self._sampler.extend([self._rows[number].sampler_row() for number in new])
        if known + new != wanted:
            place_of = {number: index for index, number in enumerate(known + new)}
            self._sampler.select([place_of[number] for number in wanted])
        self._sampling = wanted

    def _collect(self, flight: _Flight) -> None:
        """Read the tokens of a step; sequences that have ended since it was planned drop theirs."""
        sampled = flight.drawn.fetch()
        for index, number in enumerate(flight.sequences):
            row = self._rows.get(number)
            if row is None:
                continue
            end = row.take(sampled, index)
            if end is None:
                continue
            self._ended.append(end)
            self._forget(number)
            sequence = row.sequence
            kept_tokens: tuple[int, ...] = ()
            if end.is_followed:
                self._turn_before[sequence.sequence_id] = number
                kept_tokens = (*sequence.prompt.token_ids, *end.token_ids)
            self._scheduler.finish(number, kept_tokens)

    def _forget(self, number: int) -> None:
        row = self._rows.pop(number)
        self._failed_alone_at.pop(number, None)
        del self._number_of[row.sequence.sequence_id]

    def _count_prompts(self, plan: StepPlan) -> None:
        """Tokens read for the first time: not those of rows that have tokens already and are read again."""
        num_read = 0
        for chunk in plan.prefill:
            row = self._rows.get(chunk.holder)
            if row is None or not row.generated:
                num_read += chunk.num_tokens
        self._stats = replace(self._stats, num_prompt_tokens=self._stats.num_prompt_tokens + num_read)

    def _count(self, plan: StepPlan | None, finished: SequenceOf[Generation]) -> None:
        counters = self.counters
        num_sampled = 0 if plan is None else len(plan.decode) + sum(chunk.samples for chunk in plan.prefill)
        before = self._stats
        self._stats = replace(
            before,
            num_steps=before.num_steps + (plan is not None),
            num_active=counters.num_running,
            num_waiting=counters.num_waiting,
            num_completion_tokens=before.num_completion_tokens + num_sampled,
            num_preemptions=counters.num_preemptions,
            num_prefix_hits=counters.num_prefix_hits,
            num_kept_hits=counters.num_kept_hits,
            num_kept_tokens=counters.num_kept_tokens,
            num_places_used=counters.num_places_used,
            num_finished=before.num_finished + len(finished),
            num_followed=before.num_followed + sum(end.is_followed for end in finished),
        )
