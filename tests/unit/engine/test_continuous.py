"""The continuous engine against the padded one and ``generate``, with every scarcity forced and counted."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.engine import Sequence
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import (
    EOS,
    VOCAB,
    drain,
    generate_alone,
    padded,
    ragged_prompts,
    sequences,
    tiny_decoder,
    tiny_model,
)

GREEDY = SamplingParams(max_new_tokens=24)
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, top_k=40, seed=11)
FAMILIES = ("llama", "qwen2", "phi3", "mistral", "gemma2", "exaone4")
ROOMY = Limits(num_places=4096, max_rows=64, max_step_tokens=256)

Build = Callable[..., ContinuousEngine]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Decoder]]:
    """Each family as transformers runs it and as the lean decoder does, from the same files."""
    found = {}
    for family in FAMILIES:
        model = tiny_model(family)
        found[family] = (model, tiny_decoder(model, tmp_path_factory.mktemp(family)))
    return found


@pytest.fixture
def build(models: dict[str, tuple[PreTrainedModel, Decoder]]) -> Build:
    def continuous(
        family: str = "llama", limits: Limits = ROOMY, num_steps_ahead: int = 0, **options: object
    ) -> ContinuousEngine:
        decoder = models[family][1]
        kv = kv_cache.allocate(decoder.config, limits.num_places, torch.float32, torch.device("cpu"))
        arguments: dict[str, object] = {"eos_token_ids": [EOS], "max_model_len": 512, **options}
        return ContinuousEngine(decoder, kv, limits, num_steps_ahead=num_steps_ahead, **arguments)  # type: ignore[arg-type]

    return continuous


def tokens_of(engine: ContinuousEngine, submitted: list[Sequence]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: end.token_ids for key, end in drain(engine, submitted).items()}


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_on_ragged_prompts(
    build: Build, models: dict[str, tuple[PreTrainedModel, Decoder]], family: str, num_steps_ahead: int
) -> None:
    model = models[family][0]
    prompts = ragged_prompts(12, seed=1)
    limits = [3 + 7 * index % 24 for index in range(12)]
    overrides = {index: replace(GREEDY, max_new_tokens=limit) for index, limit in enumerate(limits)}
    ends = drain(build(family, num_steps_ahead=num_steps_ahead), sequences(prompts, GREEDY, overrides=overrides))
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        expected = generate_alone(model, prompt, limit)
        end = ends[f"shard:{index}", 0]
        assert list(end.token_ids) == expected, end.error
        assert end.finish_reason == ("stop" if expected[-1] == EOS else "length")


SCARCE = {
    "growth": Limits(num_places=1024, max_rows=8, max_step_tokens=64, granule=2, growth_tokens=2),
    "preemption": Limits(
        num_places=96, max_rows=8, max_step_tokens=32, granule=4, growth_tokens=4, prior_output_tokens=1
    ),
    "chunks": Limits(num_places=1024, max_rows=4, max_step_tokens=7, granule=4, growth_tokens=8),
    "one row": Limits(num_places=64, max_rows=1, max_step_tokens=5, granule=1, growth_tokens=1),
}


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
@pytest.mark.parametrize("scarcity", SCARCE)
@pytest.mark.parametrize("family", ["llama", "exaone4"])
def test_scarcity_changes_no_token_and_is_counted(
    build: Build,
    models: dict[str, tuple[PreTrainedModel, Decoder]],
    family: str,
    scarcity: str,
    num_steps_ahead: int,
) -> None:
    submitted = sequences(ragged_prompts(20, seed=4), replace(DRAWN, n=2, ignore_eos=True))
    submitted += [
        Sequence(replace(item.prompt, row_id=f"greedy:{index}", sampling=GREEDY))
        for index, item in enumerate(submitted[::4])
    ]
    expected = {key: end.token_ids for key, end in drain(padded(models[family][0]), submitted).items()}
    engine = build(family, SCARCE[scarcity], num_steps_ahead)
    assert tokens_of(engine, submitted) == expected
    counters = engine.counters
    forced = {
        "growth": counters.num_growths,
        "preemption": counters.num_preemptions,
        "chunks": counters.num_chunked_prefills,
        "one row": counters.num_growths,
    }
    assert forced[scarcity] > 0
    assert (counters.num_running, counters.num_waiting, counters.num_places_used) == (0, 0, 0)


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
@pytest.mark.parametrize("family", ["llama", "exaone4", "gemma2"])
def test_shared_prefixes_change_no_token_and_are_hit(
    build: Build, models: dict[str, tuple[PreTrainedModel, Decoder]], family: str, num_steps_ahead: int
) -> None:
    """A template of 20 tokens before 12 prompts, three samples of each."""
    template = tuple(3 + (7 * k) % (VOCAB - 3) for k in range(20))
    prompts = [template + prompt for prompt in ragged_prompts(12, seed=6, longest=10)]
    submitted = sequences(prompts, replace(DRAWN, n=3))
    expected = {key: end.token_ids for key, end in drain(padded(models[family][0]), submitted).items()}
    limits = replace(ROOMY, min_prefix_tokens=8, prefix_block=4, min_prefix_rows=2)
    engine = build(family, limits, num_steps_ahead)
    assert tokens_of(engine, submitted) == expected
    assert engine.stats().num_prefix_hits > 12
    assert engine.counters.num_places_used == 0


def test_sampled_tokens_are_the_same_for_every_limit_order_and_restart(build: Build) -> None:
    submitted = sequences(ragged_prompts(10, seed=3), replace(DRAWN, n=2))
    expected = tokens_of(build(), submitted)
    for max_rows, seed in ((1, 1), (3, 2), (7, 3)):
        shuffled = submitted.copy()
        random.Random(seed).shuffle(shuffled)
        limits = replace(ROOMY, max_rows=max_rows, max_step_tokens=20)
        half = len(shuffled) // 2
        first = tokens_of(build(limits=limits), shuffled[:half])
        assert first | tokens_of(build(limits=limits), shuffled[half:]) == expected


def test_penalties_minimum_lengths_logprobs_and_stop_strings_equal_the_padded_engine(
    build: Build, models: dict[str, tuple[PreTrainedModel, Decoder]]
) -> None:
    def decode(token_ids: tuple[int, ...]) -> str:
        return "".join(chr(97 + token % 26) + chr(97 + token // 26) for token in token_ids)

    params = replace(DRAWN, repetition_penalty=1.3, min_new_tokens=6, logprobs=3, stop=("ab", "cdb"), n=2)
    submitted = sequences(ragged_prompts(12, seed=8), params)
    expected = drain(padded(models["llama"][0], decode=decode), submitted)
    for num_steps_ahead in (0, 1):
        limits = replace(ROOMY, max_rows=5)
        found = drain(build(limits=limits, num_steps_ahead=num_steps_ahead, decode=decode), submitted)
        for key, end in expected.items():
            assert (found[key].token_ids, found[key].finish_reason) == (end.token_ids, end.finish_reason)
            assert found[key].logprobs is not None
            assert end.logprobs is not None
            for ours, theirs in zip(found[key].logprobs, end.logprobs, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_one_step_ahead_wastes_one_row_per_stop_and_no_more(build: Build) -> None:
    submitted = sequences(ragged_prompts(16, seed=2), GREEDY)
    behind, ahead = build(), build(num_steps_ahead=1)
    assert tokens_of(behind, submitted) == tokens_of(ahead, submitted)
    wasted = ahead.stats().num_completion_tokens - behind.stats().num_completion_tokens
    assert 0 < wasted <= 16


def test_aborted_sequences_never_come_back_and_free_their_places(build: Build) -> None:
    submitted = sequences(ragged_prompts(8, seed=5), replace(GREEDY, ignore_eos=True))
    for num_steps_ahead in (0, 1):
        engine = build(num_steps_ahead=num_steps_ahead)
        engine.submit(submitted)
        for _ in range(3):
            engine.step()
        engine.abort([("shard:0", 0), ("shard:5", 0), ("unknown", 0)])
        ends: set[tuple[str, int]] = set()
        while engine.num_unfinished:
            ends |= {end.sequence.sequence_id for end in engine.step()}
        assert ends == {(f"shard:{index}", 0) for index in range(8)} - {("shard:0", 0), ("shard:5", 0)}
        assert engine.counters.num_places_used == 0


def test_prompts_that_cannot_run_are_told_why_beside_the_others(build: Build) -> None:
    prompts: list[tuple[int, ...]] = [(), (5, 6), tuple(range(3, 60)), (7,)]
    engine = build(limits=Limits(num_places=40, max_rows=4, max_step_tokens=16), max_model_len=50)
    ends = drain(engine, sequences([*prompts, tuple(range(3, 48))], GREEDY))
    errors = {key[0]: end.error.error_type for key, end in ends.items() if end.error is not None}
    assert errors == {"shard:0": "empty_prompt", "shard:2": "prompt_too_long", "shard:4": "out_of_memory"}
    assert all(ends[f"shard:{index}", 0].token_ids for index in (1, 3))


def test_completions_end_at_the_models_longest_length(build: Build) -> None:
    engine = build(max_model_len=12)
    ends = drain(engine, sequences([(5, 6), tuple(range(3, 13))], replace(GREEDY, ignore_eos=True)))
    assert [len(ends[f"shard:{index}", 0].token_ids) for index in (0, 1)] == [10, 2]
    assert {end.finish_reason for end in ends.values()} == {"length"}
