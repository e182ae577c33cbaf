"""What the scheduler remembers of all that may own places in the KV arena: sequences, prefixes, kept turns."""

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum

from batchinfer.engine.prefixes import Stem
from batchinfer.engine.step_plan import DecodeRow, Extent, PrefillChunk

#: Stands for the extent of a holder that has none.
NO_EXTENT = Extent(0, 0)


class Phase(Enum):
    """Where a sequence is. Rows in prefill and decode own an extent; preempted rows wait again."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    #: It has all the tokens it may have; its extent goes with the next plan, and only ``finish`` is missing.
    COMPLETE = "complete"
    #: Finished or aborted.
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several sequences share, held once: the first ``length`` of ``founder``, the row it was made for.

    ``num_users`` counts the rows that own an extent beside it.
    """

    holder: int
    founder: "Row"
    stem: Stem
    extent: Extent = NO_EXTENT
    num_prefilled: int = 0
    num_users: int = 0
    #: The step that prefilled its last token lies before the one being planned.
    is_ready: bool = False

    @property
    def length(self) -> int:
        return self.stem.length

    @property
    def num_held(self) -> int:
        """Places of the extent that hold KV."""
        return self.num_prefilled

    @property
    def num_unread(self) -> int:
        """Tokens still to be read in its prefill."""
        return self.length - self.num_prefilled

    @property
    def is_wanted(self) -> bool:
        return self.num_users > 0 or self.stem.num_waiting > 0

    def settle(self, extent: Extent) -> None:
        self.extent = extent

    def next_chunk(self, max_tokens: int) -> PrefillChunk:
        """Plan the next part of its prefill."""
        start = self.num_prefilled
        self.num_prefilled = min(self.length, start + max_tokens)
        return PrefillChunk(self.holder, start, self.num_prefilled, self.extent.offset, samples=False)


@dataclass(slots=True, eq=False)
class Kept:
    """What is left of a sequence that has ended: its KV, for the next turn of its conversation."""

    #: The number that the sequence had.
    holder: int
    #: Tokens from the sequence's first on that have KV: in the prefix, then in the extent. A row that ran a step ahead
    #: of its stop has KV of one that is no token of it.
    num_with_kv: int
    prefix: Prefix | None
    #: Place in the line of waiting rows that it had.
    turn: tuple[int, int, int]
    extent: Extent = NO_EXTENT
    #: Known only when the sequence's last token is.
    token_ids: SequenceOf[int] = ()

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.length

    @property
    def num_held(self) -> int:
        """Places of the extent that hold KV."""
        return self.num_with_kv - self.prefix_length

    def settle(self, extent: Extent) -> None:
        self.extent = extent


@dataclass(slots=True, eq=False)
class Row:
    """A sequence, with every token that the plans made so far will have given it."""

    sequence: int
    prompt: SequenceOf[int]
    family: Hashable
    #: Prompt and generated tokens; and the most it may come to.
    num_tokens: int
    max_tokens: int
    #: Place in the line of the waiting rows; and among the rows ever admitted, the oldest first.
    turn: tuple[int, int, int]
    rank: int = -1
    phase: Phase = Phase.WAITING
    extent: Extent = NO_EXTENT
    prefix: Prefix | None = None
    #: Tokens that have KV, while in prefill.
    num_prefilled: int = 0
    #: Tokens whose KV finds room in the prefix and the extent.
    room: int = 0
    num_tokens_when_admitted: int = 0
    was_preempted: bool = False
    may_share: bool = True
    #: Another turn of its conversation is to come, for which its KV is kept.
    keeps: bool = False
    #: The sequence of the turn before, whose KV it goes on behind if that is still there.
    continues: int | None = None

    @property
    def holder(self) -> int:
        return self.sequence

    @property
    def num_generated(self) -> int:
        return self.num_tokens - len(self.prompt)

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.length

    @property
    def is_preemptable(self) -> bool:
        """A row that was preempted must come to a new token before it may be preempted again."""
        return not self.was_preempted or self.num_tokens > self.num_tokens_when_admitted

    def own_places(self, num_more: int) -> int:
        """Places beside the prefix for its tokens and ``num_more`` to come; the last token it may have needs none."""
        return max(self.num_tokens, min(self.num_tokens + num_more, self.max_tokens - 1)) - self.prefix_length

    @property
    def num_with_kv(self) -> int:
        """Tokens that have KV, in the prefix or in the extent. The newest one sampled has none until it is read."""
        has_sampled = self.phase in (Phase.DECODE, Phase.COMPLETE)
        return self.num_tokens - 1 if has_sampled else self.num_prefilled

    @property
    def num_held(self) -> int:
        """Places of the extent that hold KV."""
        return self.num_with_kv - self.prefix_length

    @property
    def num_unread(self) -> int:
        """Tokens still to be read in its prefill."""
        return self.num_tokens - self.num_prefilled

    def settle(self, extent: Extent) -> None:
        self.extent = extent
        self.room = self.prefix_length + extent.capacity

    def next_decode(self) -> DecodeRow:
        """Plan the next token; the row must have room for the KV of its newest one."""
        position = self.num_tokens - 1
        self.num_tokens += 1
        prefix = self.prefix
        if prefix is None:
            return DecodeRow(self.sequence, position, self.extent.offset)
        return DecodeRow(self.sequence, position, self.extent.offset, prefix.extent.offset, prefix.stem.length)

    def next_chunk(self, max_tokens: int) -> PrefillChunk:
        """Plan the next part of its prefill; with the last one the next token."""
        start = self.num_prefilled
        stop = self.num_prefilled = min(self.num_tokens, start + max_tokens)
        samples = stop == self.num_tokens
        self.num_tokens += samples
        prefix = self.prefix
        if prefix is None:
            return PrefillChunk(self.sequence, start, stop, self.extent.offset, samples)
        return PrefillChunk(
            self.sequence, start, stop, self.extent.offset, samples, prefix.extent.offset, prefix.length
        )
