"""Identical requests are generated once: which sequences of a unit wait for another's tokens, and what is remembered.

A greedy sequence's tokens follow from its prompt's tokens and its sampling alone, and so do the scores of given
tokens. Of all sequences of a unit that are alike in these the engine gets one, the *leader*; the others, its
*followers*, get the leader's end under their own names, a failure included. A unit's journal knows leaders alone, and
a resumed unit fans them out as before. Beside that a replica remembers what its last units' leaders came to, as far
as a bound of memory allows. Requests that are in flight in another unit are generated again: to wait for them would
tie one unit's fate to another's, and only what two units hold in flight at the same time is spent on it.

With floating-point noise between batch shapes (bfloat16 on a GPU), two rows with one prompt could come to different
tokens when each is generated; sharing, they have the same.
"""

import threading
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b

from batchinfer.engine.engine import Generation, Sequence
from batchinfer.records import FinishReason, SamplingParams, TokenLogprobs

#: Host memory for what was generated before: a few hundred thousand short answers.
MAX_BYTES = 128 * 2**20
#: What an entry takes beside its tokens, and a log-probability with and without a rival; measured, rounded up.
_ENTRY_BYTES = 400
_LOGPROB_BYTES = 160
_TOP_BYTES = 120

#: Stands for everything a request's tokens follow from. A cryptographic digest, as two requests that were taken for
#: one would silently get each other's tokens.
RequestKey = bytes


def request_keys(sequences: Iterable[Sequence]) -> Iterator[RequestKey | None]:
    """Per sequence: equal for those that must come to the same tokens, None where chance or later turns decide.

    A row's sequences have one prompt; where they follow each other, its tokens are looked at once.
    """
    prompt, of_prompt = None, blake2b()
    for sequence in sequences:
        if sequence.prompt.sampling.temperature > 0.0 or sequence.prompt.conversation is not None:
            yield None
            continue
        if sequence.prompt is not prompt:
            prompt = sequence.prompt
            of_prompt = blake2b(_what_decides(prompt.sampling), digest_size=32)
            of_prompt.update(array("q", prompt.token_ids).tobytes())
        digest = of_prompt.copy()
        # Which of the tokens are the prompt's is told by their number.
        digest.update(array("q", (len(sequence.forced), *sequence.forced)).tobytes())
        yield digest.digest()


@lru_cache(maxsize=1024)
def _what_decides(sampling: SamplingParams) -> bytes:
    """The part of greedy sampling that tokens depend on, of a length that its own beginning tells."""
    text = repr(sampling.decisive).encode()
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class SharedRequests:
    """A unit's sequences sorted out: ``leaders`` are to be generated."""

    leaders: tuple[Sequence, ...]
    #: Ends of followers whose leader had ended before.
    answered: tuple[Generation, ...]
    #: By the sequence id of their leader.
    followers: dict[tuple[str, int], tuple[Sequence, ...]]
    _keys: dict[tuple[str, int], RequestKey]

    @property
    def num_shared(self) -> int:
        """Sequences that are not generated."""
        return len(self.answered) + sum(map(len, self.followers.values()))

    def fan_out(self, generated: Iterable[Generation]) -> list[Generation]:
        """The ends of all followers, from those of their leaders."""
        return [
            *self.answered,
            *(
                _as_end_of(follower, end)
                for end in generated
                for follower in self.followers.get(end.sequence.sequence_id, ())
            ),
        ]


class RequestSharing:
    """What one replica's requests have in common. Any number of threads may call at once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._recent = RecentEnds(max_bytes)
        self._lock = threading.Lock()

    def sort_out(self, sequences: SequenceOf[Sequence], ended: Iterable[Generation] = ()) -> SharedRequests:
        """Choose leaders among a unit's sequences; ``ended`` are those of the same unit that have an end already.

        A leader is the one with most tokens of an earlier try, else the first.
        """
        whole = [end for end in ended if end.error is None]
        known = dict(zip(request_keys(end.sequence for end in whole), whole, strict=True))
        known.pop(None, None)
        leaders: list[Sequence] = []
        answered: list[Generation] = []
        alike: dict[RequestKey, list[Sequence]] = defaultdict(list)
        for sequence, key in zip(sequences, request_keys(sequences), strict=True):
            if key is None:
                leaders.append(sequence)
            elif key in known:
                answered.append(_as_end_of(sequence, known[key]))
            else:
                alike[key].append(sequence)
        followers: dict[tuple[str, int], tuple[Sequence, ...]] = {}
        keys: dict[tuple[str, int], RequestKey] = {}
        for key, group in alike.items():
            with self._lock:
                recent = self._recent.get(key)
            if recent is not None:
                answered += [recent.end_of(sequence) for sequence in group]
                continue
            leader = max(group, key=lambda it: len(it.token_ids))
            leaders.append(leader)
            keys[leader.sequence_id] = key
            if len(group) > 1:
                followers[leader.sequence_id] = tuple(sequence for sequence in group if sequence is not leader)
        return SharedRequests(tuple(leaders), tuple(answered), followers, keys)

    def remember(self, shared: SharedRequests, generated: Iterable[Generation]) -> None:
        """Keep what leaders came to for units to come; failures are not kept, as another try may succeed."""
        with self._lock:
            for end in generated:
                key = shared._keys.get(end.sequence.sequence_id)
                if key is not None and end.error is None:
                    self._recent.put(key, KeptEnd.of(end))


@dataclass(frozen=True, slots=True)
class KeptEnd:
    """A generation without its sequence, in little memory."""

    token_ids: "array[int]"
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None

    @classmethod
    def of(cls, end: Generation) -> "KeptEnd":
        return cls(array("i", end.token_ids), end.finish_reason, end.logprobs)

    @property
    def num_bytes(self) -> int:
        """Host memory it takes, about."""
        scores = sum(_LOGPROB_BYTES + _TOP_BYTES * len(token.top) for token in self.logprobs or ())
        return _ENTRY_BYTES + 4 * len(self.token_ids) + scores

    def end_of(self, sequence: Sequence) -> Generation:
        """As if ``sequence`` had been generated."""
        return Generation(sequence, tuple(self.token_ids), self.finish_reason, self.logprobs)


class RecentEnds:
    """Ends by request within ``max_bytes``; those not asked for the longest go first. For one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._ends: OrderedDict[RequestKey, KeptEnd] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ends)

    def get(self, key: RequestKey) -> KeptEnd | None:
        """What is kept of this request, which is thereby the last to go."""
        end = self._ends.get(key)
        if end is not None:
            self._ends.move_to_end(key)
        return end

    def put(self, key: RequestKey, end: KeptEnd) -> None:
        """Keep it, in the place of an earlier end of the request; one that is larger than the bound is not kept."""
        before = self._ends.pop(key, None)
        if before is not None:
            self.num_bytes -= before.num_bytes
        if end.num_bytes > self._max_bytes:
            return
        self._ends[key] = end
        self.num_bytes += end.num_bytes
        while self.num_bytes > self._max_bytes:
            _, gone = self._ends.popitem(last=False)
            self.num_bytes -= gone.num_bytes


def _as_end_of(follower: Sequence, end: Generation) -> Generation:
    """The leader's end under the follower's name."""
    error = end.error
    if error is not None:
        error = replace(error, row_id=follower.prompt.row_id)
    return replace(end, sequence=follower, error=error)
