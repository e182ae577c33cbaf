"""What one step of the continuous engine is to do, in integers: the word between scheduler and device.

The KV cache is one flat arena of token places per layer. A *holder* is whatever owns KV there: a sequence, or a
prefix that several sequences share. It owns one *extent*, a contiguous run of places. A sequence that shares a
prefix of ``prefix_length`` tokens keeps only its own part: the token at position p (counted from the sequence's
beginning) lies at place ``offset + p - prefix_length``, and it attends to the prefix's places first, then to its own.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Extent:
    """``capacity`` places from ``offset`` on."""

    offset: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the KV of ``num_tokens`` places.

    Of all copies of a step every source is read before any target is written: the target of one may overlap its
    own source or another one's.
    """

    source: int
    target: int
    num_tokens: int


class DecodeRow(NamedTuple):
    """One more token for a sequence: its newest token, at ``position``, is read and the next one is sampled.

    KV of positions ``prefix_length .. position - 1`` is in its extent already; this step writes ``position``'s.
    A named tuple, as a thousand are made in each step: twice as fast as a frozen dataclass, and ``zip(*rows)``
    gives the columns.
    """

    sequence: int
    position: int
    offset: int
    prefix_offset: int = 0
    prefix_length: int = 0


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions ``start .. stop - 1`` of a holder are read; earlier ones have KV already.

    With ``samples`` set ``stop`` is the end of the sequence's tokens and the next token is sampled.
    """

    holder: int
    start: int
    stop: int
    offset: int
    samples: bool
    prefix_offset: int = 0
    prefix_length: int = 0

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: copies first, then decode rows and prefill chunks together.

    ``preempted`` sequences have lost their KV with this plan
    and will be prefilled again later, prompt and generated tokens together.
    """

    copies: tuple[Copy, ...]
    decode: tuple[DecodeRow, ...]
    prefill: tuple[PrefillChunk, ...]
    preempted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decode) + sum(chunk.num_tokens for chunk in self.prefill)
