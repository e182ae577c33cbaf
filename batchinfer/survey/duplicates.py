"""How many prompts are there twice, in bounded memory: exact up to a cap, beyond it from an honest share of them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Distinct prompts remembered at most: 16 bytes each, twice that while two lots are joined.
MAX_DISTINCT = 8_000_000

_GREEDY_BIT = np.uint64(1)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Rows whose prompt and sampling another row has as well, the first of each kind not counted.

    Of what was looked at. ``is_estimate``: there were too many to remember, and the counts are projected from those
    whose hash fell into a share of all hashes; all copies of a prompt have one hash, so none is missed in that share.
    """

    num_rows: int
    num_duplicates: int
    #: Of them, those that are generated greedily: equal requests that give equal completions.
    num_greedy_duplicates: int
    #: Prompt tokens of the duplicates.
    num_duplicate_tokens: int
    is_estimate: bool


@dataclass(slots=True)
class DuplicateCounter:
    """Counts equal 64-bit hashes. The lowest bit of a hash says whether its prompt is generated greedily.

    Beyond ``max_distinct`` hashes, those in the upper half of the range still kept are forgotten, again and again.
    """

    max_distinct: int = MAX_DISTINCT
    num_rows: int = 0
    _log2_share: int = 0
    _hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    _counts: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    _num_tokens: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    _waiting: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]] = field(default_factory=list)
    _num_waiting: int = 0

    def add(self, hashes: NDArray[np.uint64], num_tokens: NDArray[np.uint32]) -> None:
        """Count prompts with these hashes and so many tokens each."""
        self.num_rows += len(hashes)
        self._waiting.append((hashes, num_tokens))
        self._num_waiting += len(hashes)
        # Joining sorts all that is known: seldom enough that it costs little beside the tokenising.
        if self._num_waiting > max(65_536, len(self._hashes)):
            self._join()

    def result(self) -> Duplicates:
        """What was counted so far."""
        self._join()
        extra = self._counts.astype(np.int64) - 1
        greedy = (self._hashes & _GREEDY_BIT).astype(bool)
        scale = 1 << self._log2_share
        return Duplicates(
            num_rows=self.num_rows,
            num_duplicates=min(self.num_rows, int(extra.sum()) * scale),
            num_greedy_duplicates=min(self.num_rows, int(extra[greedy].sum()) * scale),
            num_duplicate_tokens=int((extra * self._num_tokens).sum()) * scale,
            is_estimate=self._log2_share > 0,
        )

    def _join(self) -> None:
        if not self._waiting:
            return
        new_hashes = np.concatenate([hashes for hashes, _ in self._waiting])
        new_tokens = np.concatenate([tokens for _, tokens in self._waiting])
        self._waiting, self._num_waiting = [], 0
        kept = self._is_kept(new_hashes)
        hashes = np.concatenate([self._hashes, new_hashes[kept]])
        tokens = np.concatenate([self._num_tokens, new_tokens[kept]])
        counts = np.concatenate([self._counts, np.ones(int(kept.sum()), np.uint32)])
        order = np.argsort(hashes, kind="stable")
        hashes, tokens, counts = hashes[order], tokens[order], counts[order]
        if not len(hashes):
            return
        firsts = np.concatenate([[0], np.flatnonzero(hashes[1:] != hashes[:-1]) + 1])
        self._hashes, self._num_tokens = hashes[firsts], tokens[firsts]
        self._counts = np.add.reduceat(counts, firsts, dtype=np.uint32)
        while len(self._hashes) > self.max_distinct:
            self._log2_share += 1
            kept = self._is_kept(self._hashes)
            self._hashes, self._num_tokens, self._counts = (
                self._hashes[kept],
                self._num_tokens[kept],
                self._counts[kept],
            )

    def _is_kept(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """By the highest bits, which say nothing of the prompt."""
        if not self._log2_share:
            return np.ones(len(hashes), np.bool_)
        kept: NDArray[np.bool_] = (hashes >> np.uint64(64 - self._log2_share)) == 0
        return kept
