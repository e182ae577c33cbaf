"""Which requests are one request, who waits for whom, and what is remembered."""

import random
import sys
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from batchinfer.cluster.choices import sequences_of_choices
from batchinfer.cluster.request_sharing import KeptEnd, RecentEnds, RequestSharing, request_keys
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.fake import FakeEngine
from batchinfer.records import Prompt, RowError, SamplingParams, TokenLogprobs

GREEDY = SamplingParams(max_new_tokens=20)


def row(number: int, token_ids: Iterable[int], sampling: SamplingParams = GREEDY) -> list[Sequence]:
    prompt = Prompt(f"shard:{number}", list(token_ids), sampling)
    return [Sequence(prompt, sample) for sample in range(sampling.n)]


def generated(sequences: Iterable[Sequence]) -> list[Generation]:
    engine = FakeEngine()
    engine.submit(sequences)
    ends: list[Generation] = []
    while engine.num_unfinished:
        ends += engine.step()
    return ends


def through(sharing: RequestSharing, sequences: list[Sequence]) -> list[Generation]:
    """What a unit of these sequences comes to."""
    shared = sharing.sort_out(sequences)
    ends = generated(shared.leaders)
    sharing.remember(shared, ends)
    return ends + shared.fan_out(ends)


def contents(ends: Iterable[Generation]) -> dict[tuple[str, int], tuple[object, ...]]:
    return {
        end.sequence.sequence_id: (end.sequence, end.token_ids, end.finish_reason, end.logprobs, end.error)
        for end in ends
    }


def key(**changes: object) -> bytes | None:
    prompt = Prompt("shard:0", [1, 2, 3], replace(GREEDY, **changes))  # type: ignore[arg-type]
    return next(request_keys([Sequence(prompt)]))


def test_what_tokens_follow_from_tells_requests_apart_and_nothing_else_does() -> None:
    """A field of the sampling that is added later tells them apart until somebody says that it need not."""
    for name, value in {
        "max_new_tokens": 21,
        "min_new_tokens": 1,
        "repetition_penalty": 1.5,
        "stop": ("x",),
        "stop_token_ids": (7,),
        "ignore_eos": True,
        "logprobs": 0,
        "choices": ("a",),
    }.items():
        assert key(**{name: value}) != key(), name
    for name, value in {"seed": 5, "n": 4, "top_p": 0.5, "top_k": 3, "min_p": 0.1}.items():
        assert key(**{name: value}) == key(), name
    assert key(temperature=0.5) is None
    (here,), (there,) = row(0, [1, 2, 3]), row(7, (1, 2, 3))
    assert len(set(request_keys([here, there]))) == 1


def test_tokens_that_are_given_tell_requests_apart() -> None:
    alone = Sequence(Prompt("shard:0", [1, 2], GREEDY))
    forced = Sequence(Prompt("shard:0", [1, 2], GREEDY), forced=(3,))
    longer = Sequence(Prompt("shard:0", [1, 2, 3], GREEDY))
    other = Sequence(Prompt("shard:0", [1, 2], GREEDY), forced=(3, 0))
    assert len(set(request_keys([alone, forced, longer, other]))) == 4


def test_the_first_of_equal_rows_leads_and_all_get_its_end() -> None:
    sequences = [*row(0, [5, 6]), *row(1, [7]), *row(2, [5, 6]), *row(3, [5, 6])]
    shared = RequestSharing().sort_out(sequences)
    assert [it.sequence_id for it in shared.leaders] == [("shard:0", 0), ("shard:1", 0)]
    assert shared.num_shared == 2
    ends = generated(shared.leaders)
    assert contents(ends + shared.fan_out(ends)) == contents(generated(sequences))


def test_greedy_samples_of_one_row_are_one_request_and_drawn_ones_are_not() -> None:
    assert len(RequestSharing().sort_out(row(0, [5], replace(GREEDY, n=4))).leaders) == 1
    assert len(RequestSharing().sort_out(row(0, [5], replace(GREEDY, n=4, temperature=1.0))).leaders) == 4


def test_choices_of_equal_rows_are_scored_once() -> None:
    rows = [
        Prompt(f"shard:{number}", [1, 2], replace(GREEDY, choices=("a", "b")), ((5,), (6, 7))) for number in range(3)
    ]
    sequences = [sequence for prompt in rows for sequence in sequences_of_choices(prompt)]
    shared = RequestSharing().sort_out(sequences)
    assert [it.sequence_id for it in shared.leaders] == [("shard:0", 0), ("shard:0", 1)]
    ends = generated(shared.leaders)
    assert contents(ends + shared.fan_out(ends)) == contents(generated(sequences))


def test_a_follower_of_a_failed_row_fails_under_its_own_name_and_nobody_remembers_it() -> None:
    sharing = RequestSharing()
    sequences = [*row(0, [5]), *row(1, [5])]
    shared = sharing.sort_out(sequences)
    failed = Generation(shared.leaders[0], (), "length", error=RowError("shard:0", "out_of_memory", "too large", 2))
    sharing.remember(shared, [failed])
    (follower,) = shared.fan_out([failed])
    assert follower.sequence.sequence_id == ("shard:1", 0)
    assert follower.error == RowError("shard:1", "out_of_memory", "too large", 2)
    assert sharing.sort_out(row(2, [5])).leaders


def test_rows_get_the_end_that_the_journal_knows_of_their_twin() -> None:
    known = generated(row(0, [5]))
    shared = RequestSharing().sort_out([*row(1, [5]), *row(2, [6])], known)
    assert [it.sequence_id for it in shared.leaders] == [("shard:2", 0)]
    assert [it.sequence.sequence_id for it in shared.answered] == [("shard:1", 0)]
    assert shared.answered[0].token_ids == known[0].token_ids
    failed = [replace(known[0], error=RowError("shard:0", "not_finite", "NaN"))]
    assert [it.sequence_id for it in RequestSharing().sort_out(row(1, [5]), failed).leaders] == [("shard:1", 0)]


def test_the_row_that_came_furthest_in_an_earlier_try_leads() -> None:
    whole = generated(row(1, [5], replace(GREEDY, ignore_eos=True)))[0]
    begun = replace(whole.sequence, token_ids=whole.token_ids[:7])
    sequences = [*row(0, [5], replace(GREEDY, ignore_eos=True)), begun, *row(2, [5], replace(GREEDY, ignore_eos=True))]
    shared = RequestSharing().sort_out(sequences)
    assert shared.leaders == (begun,)
    ends = generated(shared.leaders)
    found = contents(ends + shared.fan_out(ends))
    assert {value[1] for value in found.values()} == {whole.token_ids}
    assert set(found) == {(f"shard:{number}", 0) for number in range(3)}


def test_units_to_come_are_answered_from_memory() -> None:
    sharing = RequestSharing()
    through(sharing, [*row(0, [5]), *row(1, [6])])
    again = [*row(10, [6]), *row(11, [7]), *row(12, [5]), *row(13, [5])]
    shared = sharing.sort_out(again)
    assert [it.sequence_id for it in shared.leaders] == [("shard:11", 0)]
    assert shared.num_shared == 3
    assert contents(through(sharing, again)) == contents(generated(again))


@pytest.mark.parametrize("max_bytes", [0, 900, 5000, 1 << 20])
def test_any_mix_of_units_ends_as_if_nothing_were_shared(max_bytes: int) -> None:
    sharing = RequestSharing(max_bytes)
    num_generated: Counter[bool] = Counter()
    for seed in range(30):
        dice = random.Random(seed)
        sequences = [
            sequence
            for number in range(40)
            for sampling in [replace(GREEDY, n=dice.choice([1, 1, 3]), temperature=dice.choice([0.0, 0.0, 0.8]))]
            for sequence in row(
                seed * 100 + number,
                [dice.randrange(6)],
                replace(sampling, logprobs=dice.choice([None, 2]), seed=dice.randrange(3)),
            )
        ]
        ends = through(sharing, sequences)
        assert contents(ends) == contents(generated(sequences))
        assert len(ends) == len(sequences)
        num_generated[True] += len(sharing.sort_out(sequences).leaders)
        num_generated[False] += len(sequences)
    assert num_generated[True] < num_generated[False]


class TestRecentEnds:
    def end(self, num_tokens: int, num_scored: int = 0, num_top: int = 0) -> KeptEnd:
        top = tuple((1000 + rank, -float(rank)) for rank in range(num_top))
        scores = tuple(TokenLogprobs(1000 + place, -0.5 - place, top) for place in range(num_scored))
        return KeptEnd(array("i", range(num_tokens)), "stop", scores or None)

    def test_those_not_asked_for_the_longest_go_first(self) -> None:
        recent = RecentEnds(3 * self.end(5).num_bytes)
        for name in (b"a", b"b", b"c"):
            recent.put(name, self.end(5))
        assert recent.get(b"a") is not None
        recent.put(b"d", self.end(5))
        assert [name for name in (b"a", b"b", b"c", b"d") if recent.get(name) is None] == [b"b"]

    def test_the_bound_holds_whatever_is_put(self) -> None:
        recent, dice = RecentEnds(20_000), random.Random(1)
        for _ in range(500):
            recent.put(bytes([dice.randrange(60)]), self.end(dice.randrange(3000), dice.randrange(20), 3))
            assert recent.num_bytes <= 20_000
        assert recent.num_bytes == sum(end.num_bytes for end in recent._ends.values())

    def test_an_end_that_is_larger_than_the_bound_is_not_kept_and_pushes_nothing_out(self) -> None:
        recent = RecentEnds(2000)
        recent.put(b"a", self.end(5))
        recent.put(b"b", self.end(5000))
        assert recent.get(b"a") is not None
        assert recent.get(b"b") is None

    @pytest.mark.parametrize(("num_scored", "num_top"), [(0, 0), (40, 0), (40, 5)])
    def test_the_bytes_counted_are_about_those_taken(self, num_scored: int, num_top: int) -> None:
        """Within a factor of two, and rather too many."""
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            recent = RecentEnds(sys.maxsize)
            for number in range(300):
                scores = tuple(
                    TokenLogprobs(
                        1000 + place + number,
                        -0.5 - place,
                        tuple((2000 + r + place, -float(r) - place) for r in range(num_top)),
                    )
                    for place in range(num_scored)
                )
                recent.put(number.to_bytes(32, "little"), KeptEnd(array("i", range(60)), "stop", scores or None))
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert taken <= recent.num_bytes <= 2 * taken
