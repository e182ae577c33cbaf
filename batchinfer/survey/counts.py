"""What is counted of prompts: lengths, dead letters by shard, duplicates; small whatever the input's size."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from batchinfer.records import Prompt, RowError, SamplingParams
from batchinfer.survey.duplicates import DuplicateCounter

#: Rows named for each kind of dead letter.
MAX_EXAMPLES = 5
_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Example:
    """A row that would become a dead letter, and why."""

    row_id: str
    error: str


@dataclass(slots=True)
class RowCounts:
    """Of the rows that were gone through."""

    num_rows: int = 0
    #: Prompt tokens -> rows.
    lengths: Counter[int] = field(default_factory=Counter)
    #: Tokens to be read. Those of later turns are not known before the answers: they count as long as the first.
    num_prompt_tokens: int = 0
    num_completions: int = 0
    #: Of them, those that are one of given choices, whose tokens are known.
    num_chosen: int = 0
    #: New tokens at most, over all samples, choices and turns; the model's limit is allowed for.
    max_new_tokens: int = 0
    #: Shard id -> error type -> rows.
    dead_letters: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    #: Of each range: (rows with a prompt, their tokens); how they differ tells how far the sample may be off.
    by_range: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class RangeCounts(RowCounts):
    """Of the rows that one task went through: what a worker sends back."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    num_tokens: "array[int]" = field(default_factory=lambda: array("I"))

    def add_range(self, shard_id: str, rendered: Iterable[Prompt | RowError], samplings: "SamplingHashes") -> None:
        """Count the rows of one range, in order."""
        num_prompts = num_tokens = 0
        for each in rendered:
            self.num_rows += 1
            if isinstance(each, RowError):
                self._add_dead_letter(shard_id, each)
                continue
            length = len(each.token_ids)
            num_prompts, num_tokens = num_prompts + 1, num_tokens + length
            self.lengths[length] += 1
            num_turns = len(each.conversation.turns) if each.conversation is not None else 1
            self.num_prompt_tokens += length * num_turns
            if each.choice_token_ids:
                self.num_completions += 1
                self.num_chosen += 1
                self.max_new_tokens += sum(map(len, each.choice_token_ids))
            else:
                self.num_completions += each.sampling.n
                self.max_new_tokens += each.sampling.n * each.sampling.max_new_tokens * num_turns
            self.hashes.append(samplings.hash_of(each))
            self.num_tokens.append(length)
        self.by_range.append((num_prompts, num_tokens))

    def _add_dead_letter(self, shard_id: str, error: RowError) -> None:
        self.dead_letters.setdefault(shard_id, Counter())[error.error_type] += 1
        examples = self.examples.setdefault(error.error_type, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(Example(error.row_id, error.error[:_ERROR_CHARS]))


class SamplingHashes:
    """Hashes prompts by all that decides what is generated but the row id: token ids, sampling, a conversation's turns.

    Of a greedy prompt's sampling, what only chance would ask for decides nothing. Equal prompts have equal hashes in
    every process.
    """

    def __init__(self) -> None:
        self._known: dict[SamplingParams, bytes] = {}

    def hash_of(self, prompt: Prompt) -> int:
        """64 bits; the lowest one says whether the prompt is generated once however often it is there."""
        sampling = prompt.sampling
        key = self._known.get(sampling)
        if key is None:
            # A row may bring sampling of its own, so that there are as many as rows.
            if len(self._known) >= 4096:
                self._known.clear()
            key = self._known[sampling] = blake2b(repr(sampling.decisive).encode(), digest_size=16).digest()
        content = blake2b(array("q", prompt.token_ids).tobytes(), digest_size=8, key=key)
        if prompt.conversation is not None:
            # Behind a first turn that two rows share, others may follow; and no conversation is shared as a whole.
            content.update(repr(prompt.conversation.turns).encode())
        bits = int.from_bytes(content.digest(), "little")
        is_shared = sampling.temperature == 0 and prompt.conversation is None
        return bits | 1 if is_shared else bits & ~1


@dataclass(slots=True)
class PromptCounts(RowCounts):
    """Counts of all tasks so far."""

    duplicates: DuplicateCounter = field(default_factory=DuplicateCounter)

    def add(self, counts: RangeCounts, *, keeps_ranges: bool) -> None:
        """Add those of one task; ``keeps_ranges`` for a sample, whose ranges are few."""
        self.num_rows += counts.num_rows
        self.lengths.update(counts.lengths)
        self.num_prompt_tokens += counts.num_prompt_tokens
        self.num_completions += counts.num_completions
        self.num_chosen += counts.num_chosen
        self.max_new_tokens += counts.max_new_tokens
        for shard_id, by_type in counts.dead_letters.items():
            self.dead_letters.setdefault(shard_id, Counter()).update(by_type)
        for error_type, examples in counts.examples.items():
            kept = self.examples.setdefault(error_type, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]
        self.duplicates.add(np.array(counts.hashes, np.uint64), np.array(counts.num_tokens, np.uint32))
        if keeps_ranges:
            self.by_range += counts.by_range
