"""Sequences whose tokens are given: their log-probabilities are those of a plain forward pass, whatever the batch."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.engine import Engine, Generation, Sequence
from batchinfer.engine.fake import FakeEngine
from batchinfer.engine.padded import PaddedEngine
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.records import Prompt, SamplingParams, TokenLogprobs
from tests.tiny import VOCAB_SIZE
from tests.unit.engine.decoder_worlds import SUPPORTED, World, make_world
from tests.unit.engine.tiny_models import drain

FAMILIES = ("exaone3", "llama", "qwen2", "exaone4")
SCORED = SamplingParams(max_new_tokens=6, logprobs=0)
DRAWN = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
#: Of one to six tokens; an end-of-sequence id inside, one that begins another, one token twice.
CHOICES = ((17,), (17, 4), (VOCAB_SIZE - 1, 9, 9), (5, 6, 7, 8), (40, 41, 42, 43, 44), (250, 3, 99, 12, 60, 61))
PROMPT_LENGTHS = (40, 3, 21, 1, 33, 12)

ROOMY = Limits(num_places=2048, max_rows=64, max_step_tokens=256, min_prefix_tokens=2, min_prefix_rows=2)
LIMITS = {
    "roomy": ROOMY,
    "chunks": replace(ROOMY, max_rows=4, max_step_tokens=7),
    "preemption": replace(
        ROOMY, num_places=64, max_rows=12, max_step_tokens=48, granule=1, growth_tokens=1, prior_output_tokens=1
    ),
    "one row": replace(ROOMY, max_rows=1),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def world(family: str) -> World:
        if family not in made:
            directory = SUPPORTED[family](tmp_path_factory.mktemp(family))
            made[family] = make_world(directory, PROMPT_LENGTHS)
        return made[family]

    return world


def continuous(world: World, limits: Limits, num_steps_ahead: int = 0) -> ContinuousEngine:
    kv = kv_cache.allocate(world.decoder.config, limits.num_places, torch.float32, torch.device("cpu"))
    eos = [VOCAB_SIZE - 1]
    return ContinuousEngine(
        world.decoder, kv, limits, eos_token_ids=eos, max_model_len=256, num_steps_ahead=num_steps_ahead
    )


def padded(world: World, **limits: int) -> PaddedEngine:
    return PaddedEngine(world.reference, eos_token_ids=[VOCAB_SIZE - 1], pad_token_id=0, max_model_len=256, **limits)


def submitted(world: World) -> list[Sequence]:
    """Every choice behind every prompt, and beside them rows that draw."""
    return [
        sequence
        for index, token_ids in enumerate(world.tokens)
        for sequence in (
            *(
                Sequence(Prompt(f"shard:{index}", tuple(token_ids), SCORED), sample, forced=forced)
                for sample, forced in enumerate(CHOICES)
            ),
            *(Sequence(Prompt(f"drawn:{index}", tuple(token_ids), DRAWN), sample) for sample in range(2)),
        )
    ]


def plain_scores(world: World, prompt: list[int], forced: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logits = world.reference(torch.tensor([[*prompt, *forced]])).logits[0, len(prompt) - 1 : -1]
    return [row[token].item() for row, token in zip(logits.float().log_softmax(-1), forced, strict=True)]


def assert_scored(world: World, ends: dict[tuple[str, int], Generation]) -> None:
    for index, prompt in enumerate(world.tokens):
        for sample, forced in enumerate(CHOICES):
            end = ends[f"shard:{index}", sample]
            assert (end.error, end.token_ids, end.finish_reason) == (None, forced, "stop")
            assert end.logprobs is not None
            expected = plain_scores(world, prompt, forced)
            assert [token.logprob for token in end.logprobs] == pytest.approx(expected, abs=1e-4)
            assert math.fsum(token.logprob for token in end.logprobs) == pytest.approx(sum(expected), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass(worlds: Callable[[str], World], family: str) -> None:
    world = worlds(family)
    engines: dict[str, Engine] = {
        "padded": padded(world),
        "padded, few rows": padded(world, max_batch_rows=3),
        "padded, few tokens": padded(world, max_batch_rows=16, max_batch_tokens=240),
        **{name: continuous(world, limits) for name, limits in LIMITS.items()},
        "one step ahead": continuous(world, LIMITS["preemption"], 1),
    }
    drawn: set[tuple[tuple[int, ...], ...]] = set()
    for name, engine in engines.items():
        ends = drain(engine, submitted(world))
        assert_scored(world, ends)
        drawn.add(tuple(end.token_ids for key, end in sorted(ends.items()) if key[0].startswith("drawn")))
        if isinstance(engine, ContinuousEngine):
            counters = engine.counters
            assert name != "chunks" or counters.num_chunked_prefills > 0
            assert name != "preemption" or counters.num_preemptions > 0
            assert (counters.num_running, counters.num_waiting, counters.num_places_used) == (0, 0, 0)
    # Rows that draw beside them draw what they always do.
    assert len(drawn) == 1


def test_long_texts_that_are_preempted_keep_their_scores_in_the_padded_engine(worlds: Callable[[str], World]) -> None:
    world = worlds("llama")
    dice = torch.Generator().manual_seed(5)
    forced = [tuple(torch.randint(2, VOCAB_SIZE, (120,), generator=dice).tolist()) for _ in range(10)]
    engine = padded(world, max_batch_rows=10, max_batch_tokens=700)
    params = replace(SCORED, max_new_tokens=120)
    given = [Sequence(Prompt(f"shard:{k}", (5 + k,), params), forced=tokens) for k, tokens in enumerate(forced)]
    ends = drain(engine, given)
    assert engine.stats().num_preemptions > 0
    for k, tokens in enumerate(forced):
        scores = [token.logprob for token in ends[f"shard:{k}", 0].logprobs or ()]
        assert scores == pytest.approx(plain_scores(world, [5 + k], tokens), abs=1e-4)


@pytest.mark.parametrize("kind", ["padded", "continuous"])
def test_choices_share_their_prompt_and_one_token_costs_no_decode(worlds: Callable[[str], World], kind: str) -> None:
    world = worlds("llama")
    engine: Engine = padded(world) if kind == "padded" else continuous(world, ROOMY)
    prompt = Prompt("shard:0", tuple(world.tokens[0]), SCORED)
    ends = drain(engine, [Sequence(prompt, sample, forced=(10 + sample,)) for sample in range(8)])
    for sample in range(8):
        (scored,) = ends["shard:0", sample].logprobs or ()
        assert scored.logprob == pytest.approx(plain_scores(world, world.tokens[0], (10 + sample,))[0], abs=1e-4)
    stats = engine.stats()
    assert stats.num_completion_tokens == 8
    if kind == "padded":
        # All in the step of the prefill.
        assert (stats.num_steps, stats.num_prompt_tokens) == (1, 40)
    else:
        # The prefix in one step, its last token with each row in the next.
        assert (stats.num_steps, stats.num_prompt_tokens, stats.num_prefix_hits) == (2, 39 + 8, 8)


@pytest.mark.parametrize("kind", ["padded", "continuous", "fake"])
def test_a_sequence_cut_anywhere_ends_as_if_uninterrupted(worlds: Callable[[str], World], kind: str) -> None:
    world = worlds("exaone3")

    def engine() -> Engine:
        if kind == "fake":
            return FakeEngine()
        return padded(world) if kind == "padded" else continuous(world, LIMITS["preemption"])

    prompt = Prompt("shard:0", tuple(world.tokens[2]), SCORED)
    whole = drain(engine(), [Sequence(prompt, 0, forced=CHOICES[5])])["shard:0", 0]
    for place in range(len(CHOICES[5]) + 1):
        began = replace(whole.sequence, token_ids=whole.token_ids[:place], logprobs=(whole.logprobs or ())[:place])
        end = drain(engine(), [began])["shard:0", 0]
        assert (end.token_ids, end.finish_reason) == (CHOICES[5], "stop")
        assert [token.logprob for token in end.logprobs or ()] == pytest.approx(
            [token.logprob for token in whole.logprobs or ()], abs=1e-4
        )
    if kind != "fake":
        # Tokens that are not the given ones are another sequence's: it starts over.
        other = (TokenLogprobs(1, -1.0), TokenLogprobs(2, -1.0))
        foreign = replace(whole.sequence, token_ids=(1, 2), logprobs=other)
        assert drain(engine(), [foreign])["shard:0", 0].token_ids == CHOICES[5]


@pytest.mark.parametrize("kind", ["padded", "continuous"])
def test_tokens_that_cannot_be_scored_are_refused_one_by_one(worlds: Callable[[str], World], kind: str) -> None:
    world = worlds("llama")
    engine: Engine = padded(world) if kind == "padded" else continuous(world, replace(ROOMY, num_places=64))
    long, short = Prompt("long:0", (5,) * 62, SCORED), Prompt("short:0", (5, 6), SCORED)
    ends = drain(
        engine,
        [
            Sequence(short, 0, forced=(7, VOCAB_SIZE)),
            Sequence(short, 1, forced=(-1,)),
            Sequence(short, 2, forced=(7,) * 255),
            Sequence(short, 3, forced=(7, 8)),
            Sequence(long, 0, forced=(7, 8, 9, 10)),
            Sequence(long, 1, forced=(7, 8, 9)),
        ],
    )
    found = {key: "" if end.error is None else end.error.error_type for key, end in ends.items()}
    # The last token of a sequence needs no place in the KV cache.
    scarce = "out_of_memory" if kind == "continuous" else ""
    assert found == {
        ("short:0", 0): "bad_token_id",
        ("short:0", 1): "bad_token_id",
        ("short:0", 2): "prompt_too_long",
        ("short:0", 3): "",
        ("long:0", 0): scarce,
        ("long:0", 1): "",
    }


def test_the_fake_engine_scores_by_prompt_and_tokens_alone() -> None:
    engine = FakeEngine()
    one, other = Prompt("shard:0", (5, 6), SCORED), Prompt("shard:1", (5, 6), SCORED)
    ends = drain(
        engine, [Sequence(prompt, sample, forced=CHOICES[sample]) for prompt in (one, other) for sample in range(6)]
    )
    scores = [math.fsum(token.logprob for token in ends["shard:0", sample].logprobs or ()) for sample in range(6)]
    assert scores == [
        math.fsum(token.logprob for token in ends["shard:1", sample].logprobs or ()) for sample in range(6)
    ]
    assert len(set(scores)) == 6
    assert max(scores) < 0
