"""The seam every engine stands behind: sequences go in, generations come out, one step at a time.

An engine is driven by one thread, which alone calls its methods. It never touches rows, files or Ray, and
runs with torch, transformers, triton and the standard library alone.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from batchinfer.records import FinishReason, Prompt, RowError, TokenLogprobs

if TYPE_CHECKING:
    from batchinfer.engine.grammar import Grammars

#: Token ids of one sequence -> text, special tokens skipped; used for stop strings only.
Decode = Callable[[SequenceOf[int]], str]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sample of one prompt. Its tokens depend on (seed, row_id, sample, turn, position) and on nothing else.

    So a sequence that begins with the tokens of an earlier try ends exactly as it would have without the interruption.
    """

    prompt: Prompt
    sample: int = 0
    #: Tokens an earlier try has generated already; the engine goes on behind them.
    token_ids: tuple[int, ...] = ()
    #: One for each of them when the prompt asks for logprobs, else empty.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Not empty: nothing is drawn, these tokens are taken one by one, and the sequence ends (``stop``) behind the last.
    #: What they are worth is in their log-probabilities, for which the prompt's sampling must ask.
    forced: tuple[int, ...] = ()

    @property
    def sequence_id(self) -> tuple[str, int]:
        """Of a conversation's turns, which have one id, never more than one is in an engine."""
        return (self.prompt.row_id, self.sample)

    @property
    def turn(self) -> int:
        """Which turn of its row's conversation it answers, counted from 0."""
        conversation = self.prompt.conversation
        return 0 if conversation is None else conversation.turn

    @property
    def has_next_turn(self) -> bool:
        """Whether, when it has ended, a sequence of the same id is to come whose prompt goes on behind its tokens."""
        conversation = self.prompt.conversation
        return conversation is not None and not conversation.is_last_turn

    @property
    def prompt_id(self) -> tuple[str, int, int]:
        """Equal for sequences in an engine that have the same prompt: samples of a row, up to their first answers."""
        turn = self.turn
        return (self.prompt.row_id, turn, self.sample if turn else 0)


@dataclass(frozen=True, slots=True)
class Generation:
    """A sequence's end. ``token_ids`` are the new tokens only, the stop token that ended it included.

    With ``error`` set the sequence could not be generated (it alone does not fit the device, say) and
    ``finish_reason`` means nothing.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: RowError | None = None

    @property
    def is_followed(self) -> bool:
        """Whether it is not its row's end: another turn is to come behind it."""
        return self.error is None and self.sequence.has_next_turn


@dataclass(frozen=True, slots=True)
class Partial:
    """How far a sequence has come: all its new tokens so far, those it began with included."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Running totals since the engine was made, and what it holds now.

    Tokens that a sequence came with, and prompts that are read again for their sake, are not counted.
    """

    num_steps: int = 0
    num_active: int = 0
    num_waiting: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_padding_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    #: Of the finished ones, those behind which another turn of their conversation is to come.
    num_followed: int = 0
    #: Later turns that found KV of the turns before, and their tokens that did not have to be read for it.
    num_kept_hits: int = 0
    num_kept_tokens: int = 0
    #: Sequences that found their prefix read already, and the KV cache's token places: used, and in all. 0 = none.
    num_prefix_hits: int = 0
    num_places_used: int = 0
    num_places: int = 0


class Engine(Protocol):
    """What the replica drives. Every call comes from the same thread."""

    @property
    def capacity(self) -> int:
        """Sequences the engine can work on at once; the replica keeps about twice as many submitted."""

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and neither returned nor aborted."""

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; order between them is the engine's to choose. Never blocks.

        What an engine keeps of a sequence that ``has_next_turn`` is its own affair: the next one says all it needs.
        """

    def step(self) -> list[Generation]:
        """Advance the sequences in hand by one forward pass (or admit new ones); return those that ended.

        Returns an empty list when there is nothing to do. An exception leaves the engine unusable.
        """

    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        """Forget these sequences, and what was kept for their next turns; unknown ids are ignored."""

    def in_progress(self) -> list[Partial]:
        """Sequences that have tokens and no end yet; same thread as step, between steps.

        Their ends come with later steps; a sequence that ended without having been returned is not among them.
        """

    def stats(self) -> EngineStats:
        """Totals for progress and metrics. May be called from any thread."""

    def close(self) -> None:
        """Give device memory back."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine ready to be driven, and what its user must know of the model behind it.

    ``name`` is the engine's kind, ``device`` where its weights are; ``eos_token_ids`` end every sequence.
    """

    engine: Engine
    name: str
    device: str
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    #: What sequences with a schema or pattern need; None for an engine or a tokenizer that cannot have them.
    grammars: "Grammars | None" = None
