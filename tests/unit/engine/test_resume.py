"""Sequences that go on behind the tokens of an earlier try end as if nothing had happened, in every engine."""

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.engine import Engine, Generation, Sequence
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import EOS, VOCAB, drain, padded, ragged_prompts, sequences, tiny_decoder, tiny_model

DRAWN = SamplingParams(max_new_tokens=14, temperature=0.9, top_p=0.95, top_k=40, seed=11, n=2)
ROOMY = Limits(num_places=2048, max_rows=64, max_step_tokens=256)
SCARCE = Limits(
    num_places=96,
    max_rows=6,
    max_step_tokens=16,
    granule=4,
    growth_tokens=4,
    prior_output_tokens=1,
    min_prefix_tokens=2,
    min_prefix_rows=2,
    prefix_block=2,
)

#: A new engine of some kind; the number chooses among limits, so that no two tries are batched alike.
Make = Callable[[int], Engine]
Ends = dict[tuple[str, int], Generation]


def decode(token_ids: SequenceOf[int]) -> str:
    """Two letters per token, so that stop strings lie across token borders."""
    return "".join(chr(97 + token % 26) + chr(97 + token // 26) for token in token_ids)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def decoder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engines(model: PreTrainedModel, decoder: Decoder) -> dict[str, Make]:
    def make_padded(number: int) -> Engine:
        return padded(model, max_batch_rows=(12, 3, 1, 7)[number % 4], decode=decode)

    def make_continuous(number: int, num_steps_ahead: int = 0) -> Engine:
        limits = (ROOMY, SCARCE, replace(ROOMY, max_rows=1), replace(SCARCE, num_places=200))[number % 4]
        kv = kv_cache.allocate(decoder.config, limits.num_places, torch.float32, torch.device("cpu"))
        return ContinuousEngine(
            decoder,
            kv,
            limits,
            eos_token_ids=[EOS],
            max_model_len=512,
            decode=decode,
            num_steps_ahead=num_steps_ahead,
        )

    return {
        "padded": make_padded,
        "continuous": make_continuous,
        "one step ahead": lambda number: make_continuous(number, 1),
        "fake": lambda number: FakeEngine(capacity=(256, 3, 1)[number % 3]),
    }


@pytest.fixture
def submitted(model: PreTrainedModel) -> list[Sequence]:
    """Eight prompts, two samples each: plain ones, and every parameter that looks back at earlier tokens."""
    prompts = ragged_prompts(8, seed=21)
    free = drain(padded(model), sequences(prompts, replace(DRAWN, ignore_eos=True)))
    # From the middle of a token to the middle of the token after the next.
    stops = [decode(free[f"shard:{index}", 0].token_ids)[7:11] for index in range(8)]
    params = {
        1: replace(DRAWN, repetition_penalty=1.4, logprobs=2),
        2: replace(DRAWN, stop=(stops[2],), ignore_eos=True),
        3: replace(DRAWN, stop=(stops[3],), min_new_tokens=8, logprobs=0),
        4: replace(DRAWN, temperature=0.0, min_new_tokens=10, n=1),
        5: replace(DRAWN, stop_token_ids=(free["shard:5", 0].token_ids[6],), repetition_penalty=0.8),
        6: replace(DRAWN, max_new_tokens=3),
        7: replace(DRAWN, stop=(stops[7], "zzz"), logprobs=1, seed=5),
    }
    return sequences(prompts, DRAWN, overrides=params)


def cut(whole: Generation, num_tokens: int) -> Sequence:
    """What is submitted again when so many of its tokens are known."""
    logprobs = (whole.logprobs or ())[:num_tokens]
    return replace(whole.sequence, token_ids=whole.token_ids[:num_tokens], logprobs=logprobs)


def assert_equal(ends: Ends, expected: Ends) -> None:
    assert ends.keys() == expected.keys()
    for key, whole in expected.items():
        end = ends[key]
        assert (end.token_ids, end.finish_reason, end.error) == (whole.token_ids, whole.finish_reason, None), key
        assert (end.logprobs is None) == (whole.logprobs is None)
        for ours, theirs in zip(end.logprobs or (), whole.logprobs or (), strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=5e-5)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


KINDS = ("padded", "continuous", "one step ahead", "fake")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_cut_anywhere_ends_as_if_uninterrupted(
    engines: dict[str, Make], submitted: list[Sequence], kind: str
) -> None:
    """Every sequence is cut at each of its positions, its very end among them; neighbours at different ones."""
    make = engines[kind]
    expected = drain(make(0), submitted)
    assert {end.finish_reason for end in expected.values()} == {"stop", "length"}
    for shift in range(max(len(end.token_ids) for end in expected.values()) + 1):
        places = [(shift + index) % (len(end.token_ids) + 1) for index, end in enumerate(expected.values())]
        engine = make(shift)
        resumed = [cut(end, place) for end, place in zip(expected.values(), places, strict=True)]
        assert_equal(drain(engine, resumed), expected)
        if kind != "one step ahead":
            num_missing = sum(len(end.token_ids) for end in expected.values()) - sum(places)
            assert engine.stats().num_completion_tokens == num_missing


@pytest.mark.parametrize("kinds", [("padded",), ("continuous",), ("one step ahead", "padded", "continuous")], ids=str)
def test_tries_that_stop_at_random_moments_add_up_to_the_whole(
    engines: dict[str, Make], submitted: list[Sequence], kinds: tuple[str, ...]
) -> None:
    """1. An engine runs a few steps. 2. It is gone. 3. The next one, with other limits, gets what was in progress."""
    expected = drain(engines["padded"](0), submitted)
    for seed in range(3):
        dice = random.Random(seed)
        missing = {sequence.sequence_id: sequence for sequence in submitted}
        ends: Ends = {}
        num_tries = num_partials = 0
        while missing:
            assert num_tries < 200
            engine = engines[kinds[num_tries % len(kinds)]](num_tries + seed)
            num_tries += 1
            engine.submit(missing.values())
            for _ in range(dice.randint(1, 12)):
                for end in engine.step():
                    assert missing.pop(end.sequence.sequence_id).prompt == end.sequence.prompt
                    ends[end.sequence.sequence_id] = end
            for partial in engine.in_progress():
                key = partial.sequence.sequence_id
                assert partial.sequence == missing[key]
                assert partial.token_ids
                assert partial.token_ids[: len(missing[key].token_ids)] == missing[key].token_ids
                assert partial.token_ids == expected[key].token_ids[: len(partial.token_ids)]
                missing[key] = replace(missing[key], token_ids=partial.token_ids, logprobs=partial.logprobs)
                num_partials += 1
            engine.close()
            assert engine.in_progress() == []
        assert num_tries > 2
        assert num_partials > 10
        assert_equal(ends, expected)


@pytest.mark.parametrize("kind", ["padded", "continuous"])
def test_tokens_that_cannot_be_the_sequences_own_are_dropped(
    engines: dict[str, Make], submitted: list[Sequence], kind: str
) -> None:
    expected = drain(engines[kind](0), submitted)
    foreign: list[Callable[[Sequence], Sequence]] = [
        lambda item: replace(item, token_ids=(*item.token_ids[:3], VOCAB)),
        lambda item: replace(item, token_ids=(-1,)),
        lambda item: replace(item, logprobs=item.logprobs[1:]),
    ]
    for spoil in foreign:
        resumed = [spoil(cut(end, len(end.token_ids) // 2)) for end in expected.values()]
        assert_equal(drain(engines[kind](1), resumed), expected)


def test_a_sequence_that_outgrew_this_arena_elsewhere_keeps_what_it_has(engines: dict[str, Make]) -> None:
    (item,) = sequences([(5, 6, 7)], replace(DRAWN, max_new_tokens=120, ignore_eos=True, n=1))
    whole = drain(engines["continuous"](0), [item])["shard:0", 0]
    assert len(whole.token_ids) == 120
    for num_tokens, expected in ((40, 94), (100, 100)):
        end = drain(engines["continuous"](1), [cut(whole, num_tokens)])["shard:0", 0]
        assert (end.token_ids, end.finish_reason) == (whole.token_ids[:expected], "length")


def test_resumed_samples_share_their_prompt_as_new_ones_do(decoder: Decoder) -> None:
    kv = kv_cache.allocate(decoder.config, ROOMY.num_places, torch.float32, torch.device("cpu"))
    limits = replace(ROOMY, min_prefix_tokens=4)
    prompt = tuple(range(5, 35))
    first = ContinuousEngine(decoder, kv, limits, eos_token_ids=[], max_model_len=512)
    expected = drain(first, sequences([prompt], replace(DRAWN, n=6)))
    second = ContinuousEngine(decoder, kv, limits, eos_token_ids=[], max_model_len=512)
    resumed = [cut(end, index * 2) for index, end in enumerate(expected.values())]
    assert_equal(drain(second, resumed), expected)
    assert second.stats().num_prefix_hits == 6
    assert second.counters.num_places_used == 0


class TestFake:
    def test_long_rows_advance_in_parts_when_a_speed_is_set(self) -> None:
        engine = FakeEngine(FakeBehaviour(tokens_per_s=400.0), sleep=lambda seconds: None)
        submitted = sequences(ragged_prompts(7, seed=1), SamplingParams(max_new_tokens=50, ignore_eos=True, logprobs=1))
        whole = drain(FakeEngine(), submitted)
        engine.submit(submitted)
        ends: Ends = {}
        num_seen = 0
        while engine.num_unfinished:
            before = {partial.sequence.sequence_id: len(partial.token_ids) for partial in engine.in_progress()}
            ends |= {end.sequence.sequence_id: end for end in engine.step()}
            for partial in engine.in_progress():
                key = partial.sequence.sequence_id
                assert partial.token_ids == whole[key].token_ids[: len(partial.token_ids)]
                assert partial.logprobs == (whole[key].logprobs or ())[: len(partial.token_ids)]
                assert len(partial.token_ids) > before.get(key, 0)
            num_seen = max(num_seen, len(engine.in_progress()))
        assert ends == whole
        assert num_seen == 4

    def test_a_resumed_row_costs_its_missing_tokens_only(self) -> None:
        slept: list[float] = []
        submitted = sequences([(5, 6)], SamplingParams(max_new_tokens=500, ignore_eos=True))
        whole = drain(FakeEngine(), submitted)["shard:0", 0]
        engine = FakeEngine(FakeBehaviour(tokens_per_s=1000.0), sleep=slept.append)
        assert drain(engine, [cut(whole, 400)])["shard:0", 0].token_ids == whole.token_ids
        assert sum(slept) == pytest.approx(0.1)
        assert (engine.stats().num_completion_tokens, engine.stats().num_prompt_tokens) == (100, 0)

    def test_waiting_rows_with_tokens_are_in_progress_too(self) -> None:
        engine = FakeEngine()
        submitted = sequences(ragged_prompts(3, seed=1), SamplingParams(max_new_tokens=50, ignore_eos=True))
        whole = drain(FakeEngine(), submitted)
        engine.submit([cut(whole["shard:0", 0], 7), submitted[1], cut(whole["shard:2", 0], 3)])
        assert [len(partial.token_ids) for partial in engine.in_progress()] == [7, 3]

    def test_tokens_of_another_sequence_are_refused(self) -> None:
        whole = drain(FakeEngine(), sequences([(5, 6), (7, 8)], SamplingParams(max_new_tokens=20, ignore_eos=True)))
        mixed = replace(whole["shard:0", 0].sequence, token_ids=whole["shard:1", 0].token_ids[:5])
        engine = FakeEngine()
        engine.submit([mixed])
        with pytest.raises(ValueError, match=r"shard:0.* not the beginning of its completion"):
            engine.step()
