"""One sequence in an engine: what it was asked for, how far it has come, when it ends."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from batchinfer.engine.engine import Decode, Generation, Partial, Sequence
from batchinfer.engine.randomness import stream_key
from batchinfer.engine.sampler import Sampled, SamplerRow
from batchinfer.engine.stopping import StopMatcher
from batchinfer.records import FinishReason, RowError, TokenLogprobs

if TYPE_CHECKING:
    from batchinfer.engine.grammar import Grammars, RowGrammar


@dataclass(slots=True, eq=False)
class Row:
    """A sequence and how far it has come; lives from submit to its end, through any preemption."""

    sequence: Sequence
    arrival: int
    key: int
    stop_ids: frozenset[int]
    max_new_tokens: int
    matcher: StopMatcher | None
    #: What the completion has to be; None = anything. Reads ``generated``.
    grammar: "RowGrammar | None" = None
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    admission: int = -1
    has_ended: bool = False
    has_failed_alone: bool = False

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.sequence.prompt.token_ids) + len(self.generated)

    @property
    def max_remaining(self) -> int:
        return self.max_new_tokens - len(self.generated)

    def sampler_row(self) -> SamplerRow:
        """The row as the sampler takes it, at its present position."""
        prompt = self.sequence.prompt
        return SamplerRow(
            prompt.sampling,
            self.key,
            tuple(self.stop_ids),
            prompt.token_ids,
            tuple(self.generated),
            self.sequence.forced,
        )

    def take(self, sampled: Sampled, index: int) -> Generation | None:
        """Add the token that was sampled for this row, the ``index``-th of the step; its end, if that is one."""
        if not sampled.is_finite[index]:
            if self.grammar is not None and self.grammar.problem:
                return self.grammar_failure(self.grammar.problem)
            cause = "the model's logits are NaN or infinite; bfloat16 or float32 avoids overflow of float16"
            return failure(self.sequence, "not_finite", cause)
        self.generated.append(sampled.token_ids[index])
        if self.logprobs is not None:
            self.logprobs.append(sampled.logprobs[index])
        reason = self.finish_reason()
        if self.grammar is not None and self.grammar.problem:
            return self.grammar_failure(self.grammar.problem)
        return None if reason is None else self.generation(reason)

    def finish_reason(self) -> FinishReason | None:
        """Why the row ends with the token it has just taken, if it does. To be asked once per token."""
        forced = self.sequence.forced
        if forced:
            return "stop" if len(self.generated) >= len(forced) else None
        token_id = self.generated[-1]
        if self.grammar is not None and self.grammar.ends():
            return "stop"
        stopped = token_id in self.stop_ids
        if self.matcher is not None and self.matcher.feed(token_id):
            stopped = True
        if stopped and len(self.generated) > self.sequence.prompt.sampling.min_new_tokens:
            return "stop"
        return "length" if len(self.generated) >= self.max_new_tokens else None

    def go_on_behind(self, token_ids: SequenceOf[int], logprobs: SequenceOf[TokenLogprobs]) -> Generation | None:
        """Take the tokens of an earlier try as if they had been sampled here; the row's end, if one of them is that."""
        for index, token_id in enumerate(token_ids):
            self.generated.append(token_id)
            if self.logprobs is not None:
                self.logprobs.append(logprobs[index])
            reason = self.finish_reason()
            if reason is not None:
                return self.generation(reason)
        return None

    def grammar_failure(self, problem: str) -> Generation:
        """The end of a row whose grammar allows nothing more, or takes too much work."""
        shown = f"behind {len(self.generated)} tokens: {problem}"
        return failure(self.sequence, "grammar_failed", shown)

    def partial(self) -> Partial:
        """How far the row has come."""
        return Partial(self.sequence, tuple(self.generated), tuple(self.logprobs or ()))

    def generation(self, reason: FinishReason) -> Generation:
        """The row's end."""
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Generation(self.sequence, tuple(self.generated), reason, logprobs)


def begin(
    sequence: Sequence,
    arrival: int,
    *,
    eos_token_ids: frozenset[int],
    vocab_size: int,
    max_model_len: int,
    decode: Decode | None,
    grammars: "Grammars | None" = None,
) -> Row | Generation:
    """A row for a sequence that was just submitted, or its end: it cannot be generated, or its tokens are one already.

    Tokens it came with that cannot be its own (ids outside the vocabulary, log-probabilities of other tokens, what its
    grammar does not allow) are dropped, and the row starts over: that gives the right ones, only later. ``decode`` is
    needed by stop strings and ``grammars`` by schemas and patterns: without them they raise ValueError, for the engine
    was made wrongly.
    """
    prompt, params = sequence.prompt, sequence.prompt.sampling
    num_prompt_tokens = len(prompt.token_ids)
    if num_prompt_tokens == 0:
        return failure(sequence, "empty_prompt", "the prompt has no tokens")
    if num_prompt_tokens >= max_model_len:
        limit = f"{num_prompt_tokens} prompt tokens leave no room in the model's {max_model_len}"
        return failure(sequence, "prompt_too_long", limit)
    if min(prompt.token_ids) < 0 or max(prompt.token_ids) >= vocab_size:
        # On a GPU such an id ends the whole process, rows of others included.
        limit = f"the prompt has token ids outside the model's vocabulary of {vocab_size}"
        return failure(sequence, "bad_token_id", limit)
    forced = sequence.forced
    if forced and num_prompt_tokens + len(forced) > max_model_len:
        limit = f"{num_prompt_tokens} prompt tokens and {len(forced)} given ones pass the model's {max_model_len}"
        return failure(sequence, "prompt_too_long", limit)
    if forced and not 0 <= min(forced) <= max(forced) < vocab_size:
        limit = f"the tokens to take hold ids outside the model's vocabulary of {vocab_size}"
        return failure(sequence, "bad_token_id", limit)
    matcher = None
    if params.stop and not forced:
        if decode is None:
            raise ValueError(f"{prompt.row_id} has stop strings, but the engine was made without decode")
        matcher = StopMatcher(params.stop, decode, params.min_new_tokens)
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    generated: list[int] = []
    grammar = None
    if params.has_grammar and not forced:
        if grammars is None:
            raise ValueError(f"{prompt.row_id} has a schema or pattern, but the engine was made without grammars")
        grammar = grammars.begin(params, stop_ids, generated)
    row = Row(
        sequence=sequence,
        arrival=arrival,
        key=stream_key(params.seed, prompt.row_id, sequence.sample, sequence.turn),
        stop_ids=stop_ids,
        max_new_tokens=len(forced) or min(params.max_new_tokens, max_model_len - num_prompt_tokens),
        matcher=matcher,
        grammar=grammar,
        generated=generated,
        logprobs=None if params.logprobs is None else [],
    )
    if not _are_tokens_of(sequence, vocab_size):
        return row
    end = row.go_on_behind(sequence.token_ids, sequence.logprobs)
    if grammar is not None and grammar.problem:
        return begin(
            replace(sequence, token_ids=(), logprobs=()),
            arrival,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            decode=decode,
            grammars=grammars,
        )
    return end or row


def _are_tokens_of(sequence: Sequence, vocab_size: int) -> bool:
    """Whether the tokens that the sequence came with can be its own."""
    token_ids = sequence.token_ids
    if not token_ids:
        return False
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        return False
    if sequence.forced and token_ids != sequence.forced[: len(token_ids)]:
        return False
    return sequence.prompt.sampling.logprobs is None or token_ids == tuple(
        scored.token_id for scored in sequence.logprobs
    )


def failure(sequence: Sequence, error_type: str, error: str) -> Generation:
    """The end of a sequence that cannot be generated."""
    conversation = sequence.prompt.conversation
    cause = error if conversation is None else conversation.named(error)
    return Generation(sequence, (), "length", error=RowError(sequence.prompt.row_id, error_type, cause))
