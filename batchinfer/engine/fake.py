"""An engine without a model: completions that anybody can recompute, speed and faults as ordered. No torch.

Used to run and break whole jobs in seconds. Greedy completions are a function of the prompt's tokens; sampled
ones of (prompt, seed, row_id, sample); the scores of given tokens of (prompt, those tokens). Token p of a completion
does not depend on ``max_new_tokens``, so a shorter limit gives a prefix of the same tokens. A sequence that comes with
tokens which are not the beginning of its completion is refused: a real engine could not tell that some journal gave it
another sequence's.
"""

import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random

from batchinfer.engine.engine import EngineStats, Generation, Partial, Sequence
from batchinfer.engine.randomness import stream_key
from batchinfer.errors import BatchinferError
from batchinfer.records import FinishReason, TokenLogprobs

#: Rows that one step finishes when no speed is set.
_ROWS_PER_STEP = 256
#: Seconds of simulated work in one step when a speed is set: short, so that an interrupted run ends soon.
_STEP_S = 0.05
#: Rows that grow side by side when a speed is set.
_ROWS_AT_ONCE = 4
#: Tokens are slices of one fixed random table, as slicing costs nothing per token.
_NUM_TABLE_TOKENS = 1 << 16
#: Exit status of a process that a fault kills.
CRASH_STATUS = 86


class FakeEngineFault(BatchinferError):
    """The error that ``error_rate`` orders, standing for one of a device driver."""


@dataclass(frozen=True, slots=True)
class FakeBehaviour:
    """Speed and faults; the fields mean what they mean in the job file's ``engine.fake`` block.

    A replica that replaces a crashed one should get another ``fault_seed``, or it crashes at the same step.
    """

    tokens_per_s: float | None = None
    start_s: float = 0.0
    error_rate: float = 0.0
    crash_rate: float = 0.0
    poison_token_id: int | None = None
    fault_seed: int | str = 0


@dataclass(slots=True)
class _Row:
    """A sequence being generated: its whole completion, and how many of its tokens are out."""

    completion: Generation
    num_tokens: int

    @property
    def num_missing(self) -> int:
        return len(self.completion.token_ids) - self.num_tokens

    def partial(self) -> Partial:
        whole = self.completion
        logprobs = (whole.logprobs or ())[: self.num_tokens]
        return Partial(whole.sequence, whole.token_ids[: self.num_tokens], logprobs)


class FakeEngine:
    """``Engine`` over arithmetic; ids are in ``reserved .. vocab_size - 1``."""

    def __init__(
        self,
        behaviour: FakeBehaviour | None = None,
        *,
        vocab_size: int = 32000,
        reserved: int = 0,
        capacity: int = _ROWS_PER_STEP,
        sleep: Callable[[float], None] = time.sleep,
        crash: Callable[[int], object] = os._exit,
    ) -> None:
        """Blocks for ``start_s``. Raises ValueError when no id is left above the reserved ones."""
        if vocab_size <= reserved:
            raise ValueError(f"vocab_size {vocab_size} leaves no token id above the {reserved} reserved ones")
        self._behaviour = behaviour or FakeBehaviour()
        self._sleep = sleep
        self._crash = crash
        self._capacity = capacity
        self._reserved = reserved
        self._num_ids = vocab_size - reserved
        table = Random(0)
        doubled = [reserved + table.randrange(self._num_ids) for _ in range(_NUM_TABLE_TOKENS)] * 2
        self._table = tuple(doubled)
        self._faults = Random(self._behaviour.fault_seed)
        self._waiting: deque[Sequence] = deque()
        self._rows: deque[_Row] = deque()
        self._stats = EngineStats()
        if self._behaviour.start_s:
            sleep(self._behaviour.start_s)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._rows)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)
        self._count()

    def step(self) -> list[Generation]:
        """Finish the next rows, or take them a bit further when a speed is set.

        Raises FakeEngineFault, or ends the process, where the faults say so, and ValueError for a sequence that came
        with tokens of another one.
        """
        if not self.num_unfinished:
            return []
        self._misbehave()
        rate = self._behaviour.tokens_per_s
        # Tokens of this step, and what a row gets of them in its turn.
        max_tokens = sys.maxsize if rate is None else max(1, round(rate * _STEP_S))
        share = max_tokens if rate is None else -(-max_tokens // _ROWS_AT_ONCE)
        finished: list[Generation] = []
        num_tokens = num_prompt_tokens = 0
        while self.num_unfinished and len(finished) < self._capacity and num_tokens < max_tokens:
            while self._waiting and len(self._rows) < _ROWS_AT_ONCE:
                num_prompt_tokens += self._begin_next()
            row = self._rows.popleft()
            num_more = min(row.num_missing, share, max_tokens - num_tokens)
            num_tokens += num_more
            row.num_tokens += num_more
            if row.num_missing:
                self._rows.append(row)
            else:
                finished.append(row.completion)
        if rate is not None:
            self._sleep(num_tokens / rate)
        self._stats = replace(
            self._stats,
            num_steps=self._stats.num_steps + 1,
            num_prompt_tokens=self._stats.num_prompt_tokens + num_prompt_tokens,
            num_completion_tokens=self._stats.num_completion_tokens + num_tokens,
            num_finished=self._stats.num_finished + len(finished),
            num_followed=self._stats.num_followed + sum(end.is_followed for end in finished),
        )
        self._count()
        return finished

    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        unwanted = set(sequence_ids)
        self._waiting = deque(seq for seq in self._waiting if seq.sequence_id not in unwanted)
        self._rows = deque(row for row in self._rows if row.completion.sequence.sequence_id not in unwanted)
        self._count()

    def in_progress(self) -> list[Partial]:
        begun = [row.partial() for row in self._rows if row.num_tokens]
        return begun + [Partial(seq, seq.token_ids, seq.logprobs) for seq in self._waiting if seq.token_ids]

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._waiting.clear()
        self._rows.clear()
        self._count()

    def _count(self) -> None:
        self._stats = replace(self._stats, num_active=len(self._rows), num_waiting=len(self._waiting))

    def _begin_next(self) -> int:
        """The first waiting sequence becomes a row; how many prompt tokens were read for the first time."""
        sequence = self._waiting[0]
        if self._behaviour.poison_token_id in sequence.prompt.token_ids:
            self._crash(CRASH_STATUS)
        completion = self._complete(sequence)
        num_tokens = len(sequence.token_ids)
        if sequence.token_ids != completion.token_ids[:num_tokens]:
            raise ValueError(f"{sequence.sequence_id} came with tokens that are not the beginning of its completion")
        self._waiting.popleft()
        self._rows.append(_Row(completion, num_tokens))
        return 0 if num_tokens else len(sequence.prompt.token_ids)

    def _misbehave(self) -> None:
        """Draw both faults in every step, so that setting one rate does not move the other's moments."""
        crashes, fails = self._faults.random(), self._faults.random()
        if crashes < self._behaviour.crash_rate:
            self._crash(CRASH_STATUS)
        if fails < self._behaviour.error_rate:
            raise FakeEngineFault(f"ordered by engine.fake.error_rate {self._behaviour.error_rate}")

    def _complete(self, sequence: Sequence) -> Generation:
        prompt, params = sequence.prompt, sequence.prompt.sampling
        digest = blake2b(array("q", [*prompt.token_ids, *sequence.forced]).tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if sequence.forced:
            logprobs = None if params.logprobs is None else self._logprobs(key, sequence.forced, params.logprobs)
            return Generation(sequence, sequence.forced, "stop", logprobs)
        if params.temperature > 0.0:
            key ^= stream_key(params.seed, prompt.row_id, sequence.sample, sequence.turn)
        # The cube skews lengths: half of the rows end within an eighth of their limit.
        skewed = ((key >> 48) / (1 << 16)) ** 3
        length = params.max_new_tokens if params.ignore_eos else 1 + int(params.max_new_tokens * skewed)
        length = max(params.min_new_tokens, min(length, params.max_new_tokens))
        token_ids = self._tokens(key, length)
        reason: FinishReason = "length" if length == params.max_new_tokens else "stop"
        logprobs = None if params.logprobs is None else self._logprobs(key, token_ids, params.logprobs)
        return Generation(sequence, token_ids, reason, logprobs)

    def _tokens(self, key: int, length: int) -> tuple[int, ...]:
        """Two ids from the key itself, so that few completions are equal, then a slice of the table."""
        head = (self._reserved + key % self._num_ids, self._reserved + (key >> 24) % self._num_ids)
        start = (key >> 16) % _NUM_TABLE_TOKENS
        tokens = head + self._table[start : start + length - 2] if length > 2 else head[:length]
        while len(tokens) < length:
            tokens += self._table[: length - len(tokens)]
        return tokens

    def _logprobs(self, key: int, token_ids: tuple[int, ...], num_top: int) -> tuple[TokenLogprobs, ...]:
        """Well-formed rather than meaningful: the chosen token is the likeliest, the next ones halve."""
        others = min(num_top, self._num_ids)
        scored = []
        for position, token_id in enumerate(token_ids):
            best = -((key + position) % 1000) / 1000.0 - 0.7
            ranked = [self._reserved + (token_id - self._reserved + rank) % self._num_ids for rank in range(others)]
            top = tuple((other, best - 0.7 * rank) for rank, other in enumerate(ranked))
            scored.append(TokenLogprobs(token_id, best, top))
        return tuple(scored)
