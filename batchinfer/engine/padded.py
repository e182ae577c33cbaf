"""The reference engine: any transformers causal LM, in one left-padded batch that rows join and leave.

A step is either the prefill of a group of waiting rows or one token for every row of the batch. Which of the
two is decided in ``batching``; where KV lives is ``padded_cache``'s; which token comes next is the sampler's.
Running out of memory costs work, never results: all rows go back to waiting with what they have generated,
the limits are halved, and each continues from a prefill of its prompt and its own tokens.
"""

import inspect
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from batchinfer.engine import batching
from batchinfer.engine.batching import BatchLimits, BatchShape, RowShape
from batchinfer.engine.engine import Decode, EngineStats, Generation, Partial, Sequence
from batchinfer.engine.out_of_memory import MEMORY_ERRORS, does_not_fit, is_out_of_memory
from batchinfer.engine.padded_cache import PaddedCache
from batchinfer.engine.padded_limits import check_layers, default_limits
from batchinfer.engine.row import Row, begin
from batchinfer.engine.sampler import Sampled, Sampler
from batchinfer.engine.token_masks import TokenMasks

if TYPE_CHECKING:
    from batchinfer.engine.grammar import Grammars

#: What a completion's length is expected to be before any has ended, and how many ended ones that guess counts for.
_PRIOR_NEW_TOKENS = 64
_PRIOR_WEIGHT = 8


class PaddedEngine:
    """``Engine`` over a transformers model in eval mode; see the module's text.

    Greedy completions equal ``model.generate`` of each prompt alone. A sampled token depends on its logits and
    on (seed, row_id, sample, position) only, so what batches can change is the logits' last bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Iterable[int],
        pad_token_id: int,
        max_model_len: int,
        decode: Decode | None = None,
        grammars: "Grammars | None" = None,
        max_batch_rows: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> None:
        """``decode`` is needed by sequences with stop strings only, ``grammars`` by those with a schema or pattern.

        Limits left out come from the device.
        Raises ModelError for a model whose layers keep something else than keys and values.
        """
        check_layers(model.config)
        config = model.config.get_text_config()
        self._model = model
        self._device = model.device
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._max_model_len = max_model_len
        self._decode = decode
        self._grammars = grammars
        self._limits = default_limits(model, max_batch_rows, max_batch_tokens)
        self._capacity = self._limits.max_rows
        self._accepted = _accepted_arguments(model)
        self._cache = PaddedCache(config.num_hidden_layers, self._limits.max_rows, self._limits.max_tokens)
        self._sampler = Sampler(config.vocab_size, self._device)
        self._waiting: list[Row] = []
        self._rows: list[Row] = []
        #: Ends that no step has returned yet.
        self._ended: list[Generation] = []
        #: Device side of the rows: next input token and tokens in the KV cache; None after the rows changed.
        self._tokens_R: torch.Tensor | None = None
        self._lengths_R: torch.Tensor | None = None
        self._num_arrivals = 0
        self._num_admissions = 0
        self._stats = EngineStats()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def limits(self) -> BatchLimits:
        """What the batch may hold now; halved by every out-of-memory error."""
        return self._limits

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._rows) + len(self._ended)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._submit_one(sequence)
        capacity = self._capacity
        self._waiting.sort(key=lambda row: batching.order_key(row.arrival, row.length, capacity))
        self._count()

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        joining: list[Row] = []
        out_of_memory = False
        try:
            self._preempt_overgrown()
            joining = self._waiting[: self._plan()]
            if joining:
                self._prefill(joining)
            elif self._rows:
                self._decode_step()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            # Handled below: until this clause ends, the traceback keeps the failed pass's tensors alive.
            out_of_memory = True
        if out_of_memory:
            self._retreat(joining)
        if not self._rows and not self._waiting:
            self._cache.release()
        finished, self._ended = self._ended, []
        self._stats = replace(
            self._stats,
            num_steps=self._stats.num_steps + 1,
            num_finished=self._stats.num_finished + len(finished),
            num_followed=self._stats.num_followed + sum(end.is_followed for end in finished),
        )
        self._count()
        return finished

    @torch.inference_mode()
    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        unwanted = set(sequence_ids)
        self._waiting = [row for row in self._waiting if row.sequence.sequence_id not in unwanted]
        self._ended = [end for end in self._ended if end.sequence.sequence_id not in unwanted]
        self._remove([index for index, row in enumerate(self._rows) if row.sequence.sequence_id in unwanted])
        self._count()

    def in_progress(self) -> list[Partial]:
        return [row.partial() for row in (*self._rows, *self._waiting) if row.generated]

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._waiting, self._rows, self._ended = [], [], []
        self._tokens_R = self._lengths_R = None
        self._sampler = Sampler(0, self._device)
        self._cache.release()
        self._count()

    def _submit_one(self, sequence: Sequence) -> None:
        row = begin(
            sequence,
            self._num_arrivals,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._sampler.vocab_size,
            max_model_len=self._max_model_len,
            decode=self._decode,
            grammars=self._grammars,
        )
        if isinstance(row, Generation):
            self._ended.append(row)
            return
        self._waiting.append(row)
        self._num_arrivals += 1

    def _plan(self) -> int:
        """How many of the first waiting rows join in this step."""
        shapes: list[RowShape] = []
        prompt_id_before = None
        for row in self._waiting[: self._capacity]:
            prompt_id = None if row.generated else row.sequence.prompt_id
            is_copy = prompt_id is not None and prompt_id == prompt_id_before
            shapes.append(RowShape(row.length, row.max_remaining, is_copy))
            prompt_id_before = prompt_id
        return batching.plan_admission(
            shapes,
            self._batch_shape(self._rows),
            self._limits,
            self._expected_new_tokens(),
        )

    def _prefill(self, joining: list[Row]) -> None:
        """Read the rows' tokens, draw the next token of each; samples of one unread prompt share one reading."""
        first_of: dict[tuple[str, int, int], int] = {}
        prefilled: list[Row] = []
        copies: list[Row] = []
        copies_of: list[int] = []
        for row in joining:
            prompt_id = row.sequence.prompt_id
            if not row.generated and prompt_id in first_of:
                copies.append(row)
                copies_of.append(first_of[prompt_id])
            else:
                if not row.generated:
                    first_of[prompt_id] = len(prefilled)
                prefilled.append(row)
        lengths = [row.length for row in prefilled]
        width = max(lengths)
        self._cache.open_prefill(len(joining), len(prefilled), width, self._width())
        tokens = [
            [self._pad_token_id] * (width - row.length) + [*row.sequence.prompt.token_ids, *row.generated]
            for row in prefilled
        ]
        logits_RV = self._forward(
            torch.tensor(tokens, device=self._device), torch.tensor(lengths, device=self._device), width
        )
        self._cache.close_prefill(len(prefilled), copies_of)
        if copies_of:
            order = [*range(len(prefilled)), *copies_of]
            logits_RV = logits_RV[torch.tensor(order, device=self._device)]
        group = prefilled + copies
        # Sampled apart from the batch, whose rows have no logits in this step.
        sampler = Sampler(self._sampler.vocab_size, self._device)
        sampler.extend([row.sampler_row() for row in group])
        sampled = sampler.sample(logits_RV, self._masks(group))
        del self._waiting[: len(joining)]
        offset = len(self._rows)
        for row in group:
            row.admission = self._num_admissions
            self._num_admissions += 1
        num_unread = sum(len(row.sequence.prompt.token_ids) for row in prefilled if not row.generated)
        self._stats = replace(
            self._stats,
            num_prompt_tokens=self._stats.num_prompt_tokens + num_unread,
            num_padding_tokens=self._stats.num_padding_tokens + width * len(prefilled) - sum(lengths),
        )
        self._rows += group
        self._tokens_R = self._lengths_R = None
        leaving = self._take_tokens(group, sampled)
        self._sampler.extend([row.sampler_row() for row in group])
        self._remove([offset + index for index in leaving])

    def _decode_step(self) -> None:
        width = self._width()
        self._cache.open_decode(width)
        if self._tokens_R is None or self._lengths_R is None:
            self._tokens_R = torch.tensor([row.generated[-1] for row in self._rows], device=self._device)
            self._lengths_R = torch.tensor([row.length for row in self._rows], device=self._device)
        logits_RV = self._forward(self._tokens_R[:, None], self._lengths_R, width + 1)
        sampled = self._sampler.sample(logits_RV, self._masks(self._rows))
        self._cache.close_decode()
        self._tokens_R = sampled.tokens
        self._lengths_R = self._lengths_R + 1
        self._remove(self._take_tokens(self._rows, sampled))

    def _forward(self, tokens_RT: torch.Tensor, lengths_R: torch.Tensor, width: int) -> torch.Tensor:
        """Logits [R, V] after the last token; rows have ``lengths_R`` tokens, these ``T`` included, of ``width``."""
        columns = torch.arange(width, device=self._device)
        padding_R1 = (width - lengths_R)[:, None]
        position_ids_RT = (columns[width - tokens_RT.shape[1] :] - padding_R1).clamp(min=0)
        arguments = {
            "input_ids": tokens_RT,
            "attention_mask": (columns >= padding_R1).long(),
            "past_key_values": self._cache,
            "use_cache": True,
            "position_ids": position_ids_RT,
            "logits_to_keep": 1,
        }
        output = self._model(**{name: value for name, value in arguments.items() if name in self._accepted})
        logits_RV: torch.Tensor = output.logits[:, -1]
        return logits_RV

    def _masks(self, rows: SequenceOf[Row]) -> TokenMasks | None:
        """What those of the rows that have a grammar may take next."""
        if self._grammars is None:
            return None
        steered = [(place, row.grammar) for place, row in enumerate(rows) if row.grammar is not None]
        return self._grammars.masks(steered) if steered else None

    def _take_tokens(self, rows: SequenceOf[Row], sampled: Sampled) -> list[int]:
        """Give each row its token; the indices of those that ended with it."""
        leaving: list[int] = []
        for index, row in enumerate(rows):
            end = row.take(sampled, index)
            if end is not None:
                # Marked at once: a lack of memory later in this step must not start the row again.
                row.has_ended = True
                self._ended.append(end)
                leaving.append(index)
        # As they come, not as rows end: progress is watched by them.
        num_taken = sum(sampled.is_finite)
        self._stats = replace(self._stats, num_completion_tokens=self._stats.num_completion_tokens + num_taken)
        return leaving

    def _remove(self, leaving: SequenceOf[int]) -> None:
        """Close the gaps that the leaving rows make, in the rows, the cache and the sampler alike."""
        if not leaving:
            return
        num_left = len(self._rows) - len(leaving)
        moves = batching.fill_holes(len(self._rows), leaving)
        order = list(range(num_left))
        for target, source in moves:
            order[target] = source
        self._rows = [self._rows[index] for index in order]
        self._sampler.select(order)
        self._cache.remove_rows(moves, num_left)
        self._tokens_R = self._lengths_R = None

    def _preempt_overgrown(self) -> None:
        """Send rows back to waiting while the batch would outgrow ``max_tokens``."""
        lengths = [row.length for row in self._rows]
        preempted = batching.choose_preempted(lengths, [row.admission for row in self._rows], self._limits)
        self._wait_again([self._rows[index] for index in preempted])
        self._remove(preempted)

    def _retreat(self, joining: list[Row]) -> None:
        """After an out-of-memory error: forget all KV, halve the limits, start over from the rows' tokens.

        A row that was alone cannot be made smaller: it gets one more try, without what the cache held in
        reserve, then it ends with an error. The limits stay.
        """
        running = [row for row in self._rows if not row.has_ended]
        attempted = running + [row for row in joining if not row.has_ended and row not in running]
        if len(attempted) == 1 and attempted[0].has_failed_alone:
            only = attempted[0]
            running = []
            self._waiting = [row for row in self._waiting if row is not only]
            self._ended.append(does_not_fit(only))
        elif len(attempted) == 1:
            attempted[0].has_failed_alone = True
        elif attempted:
            num_prefill_tokens = len(joining) * max((row.length for row in joining), default=0)
            self._limits = batching.limits_after_out_of_memory(
                self._limits, self._batch_shape(attempted), num_prefill_tokens, self._expected_new_tokens()
            )
        self._rows = []
        self._tokens_R = self._lengths_R = None
        self._sampler.select([])
        self._cache.release()
        self._cache.max_tokens = self._limits.max_tokens
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._wait_again(running)

    def _wait_again(self, rows: list[Row]) -> None:
        if rows:
            self._waiting += rows
            capacity = self._capacity
            self._waiting.sort(key=lambda row: batching.order_key(row.arrival, row.length, capacity))
            self._stats = replace(self._stats, num_preemptions=self._stats.num_preemptions + len(rows))

    def _width(self) -> int:
        """Columns of KV that the batch's rows need; the newest token of a row is not in the cache yet."""
        return max((row.length - 1 for row in self._rows), default=0)

    def _batch_shape(self, rows: SequenceOf[Row]) -> BatchShape:
        return BatchShape(
            num_rows=len(rows),
            width=max((row.length for row in rows), default=0),
            max_remaining=max((row.max_remaining for row in rows), default=0),
        )

    def _expected_new_tokens(self) -> int:
        """Running mean length of a completion."""
        num_tokens = _PRIOR_NEW_TOKENS * _PRIOR_WEIGHT + self._stats.num_completion_tokens
        return num_tokens // (_PRIOR_WEIGHT + self._stats.num_finished)

    def _count(self) -> None:
        self._stats = replace(self._stats, num_active=len(self._rows), num_waiting=len(self._waiting))


def _accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Which of our arguments the model's forward takes: some have no positions, some always give all logits."""
    names = {"input_ids", "attention_mask", "past_key_values", "use_cache", "position_ids", "logits_to_keep"}
    parameters = inspect.signature(model.forward).parameters
    return frozenset(name for name in names if name in parameters)
