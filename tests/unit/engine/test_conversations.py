"""Turns of a conversation in the engines: KV kept between them changes no token, and spares the reading."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.engine import Engine, Generation, Sequence
from batchinfer.engine.fake import FakeEngine
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.records import Conversation, Prompt, SamplingParams
from tests.unit.engine.test_continuous_memory import ShortOfMemory
from tests.unit.engine.tiny_models import (
    EOS,
    VOCAB,
    generate_alone,
    padded,
    ragged_prompts,
    tiny_decoder,
    tiny_model,
)

GREEDY = SamplingParams(max_new_tokens=12)
DRAWN = SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=11, n=2, repetition_penalty=1.2, logprobs=1)
ROOMY = Limits(num_places=4096, max_rows=64, max_step_tokens=256)
FAMILIES = ("llama", "gemma2", "exaone4")
NUM_TURNS = 3

#: (row id, sample, turn) -> the tokens of that turn.
Answers = dict[tuple[str, int, int], tuple[int, ...]]
#: Of a turn's prompt, its tokens and the row's number -> the prompt of the turn behind it.
Template = Callable[[tuple[int, ...], tuple[int, ...], int], tuple[int, ...]]


def chat(prompt: tuple[int, ...], answer: tuple[int, ...], row: int) -> tuple[int, ...]:
    """The answer as it was generated, then two to four tokens of the user."""
    return (*prompt, *answer, *(3 + (7 * row + k) % (VOCAB - 3) for k in range(2 + row % 3)))


def thoughtless(prompt: tuple[int, ...], answer: tuple[int, ...], row: int) -> tuple[int, ...]:
    """Of the answer only the second half is told again."""
    return chat(prompt, answer[len(answer) // 2 :], row)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Decoder]]:
    found = {}
    for family in FAMILIES:
        model = tiny_model(family)
        found[family] = (model, tiny_decoder(model, tmp_path_factory.mktemp(family)))
    return found


def continuous(decoder: Decoder | ShortOfMemory, limits: Limits = ROOMY, num_steps_ahead: int = 0) -> ContinuousEngine:
    kv = kv_cache.allocate(decoder.config, limits.num_places, torch.float32, torch.device("cpu"))
    return ContinuousEngine(
        decoder,  # type: ignore[arg-type]
        kv,
        limits,
        eos_token_ids=[EOS],
        max_model_len=512,
        num_steps_ahead=num_steps_ahead,
    )


def first_turns(prompts: list[tuple[int, ...]], sampling: SamplingParams) -> list[Sequence]:
    conversation = Conversation(("?",) * NUM_TURNS, sampling)
    return [
        Sequence(Prompt(f"shard:{row}", prompt, sampling, conversation=conversation), sample)
        for row, prompt in enumerate(prompts)
        for sample in range(sampling.n)
    ]


def next_turn(end: Generation, template: Template) -> Sequence:
    before = end.sequence.prompt
    assert before.conversation is not None
    longer = replace(before.conversation, answers=(*before.conversation.answers, "!"))
    row = int(before.row_id.partition(":")[2])
    token_ids = template(tuple(before.token_ids), tuple(end.token_ids), row)
    return Sequence(replace(before, token_ids=token_ids, conversation=longer), end.sequence.sample)


def converse(
    engine: Engine, first: list[Sequence], template: Template = chat, *, keeps: bool = True, delay: int = 0
) -> Answers:
    """All turns of all conversations, each asked so many steps after the one before it has ended."""
    answers: Answers = {}
    coming: list[list[Sequence]] = [[] for _ in range(delay + 1)]
    engine.submit(first)
    while engine.num_unfinished or any(coming):
        engine.submit(coming.pop(0))
        coming.append([])
        for end in engine.step():
            assert end.error is None, end.error
            sequence = end.sequence
            answers[(*sequence.sequence_id, sequence.turn)] = tuple(end.token_ids)
            if sequence.has_next_turn:
                if not keeps:
                    engine.abort([sequence.sequence_id])
                coming[-1].append(next_turn(end, template))
    return answers


def is_empty(engine: ContinuousEngine) -> bool:
    counters = engine.counters
    return (counters.num_running, counters.num_waiting, counters.num_places_used) == (0, 0, 0)


@pytest.mark.parametrize(("family", "num_steps_ahead"), [("llama", 0), ("llama", 1), ("gemma2", 1), ("exaone4", 0)])
def test_greedy_turns_equal_generate_turn_by_turn(
    models: dict[str, tuple[PreTrainedModel, Decoder]], family: str, num_steps_ahead: int
) -> None:
    model, decoder = models[family]
    prompts = ragged_prompts(5, seed=1)
    engine = continuous(decoder, num_steps_ahead=num_steps_ahead)
    answers = converse(engine, first_turns(prompts, GREEDY))
    assert len(answers) == len(prompts) * NUM_TURNS
    num_prompt_tokens = 0
    for row, prompt in enumerate(prompts):
        for turn in range(NUM_TURNS):
            answer = answers[f"shard:{row}", 0, turn]
            assert list(answer) == generate_alone(model, prompt, GREEDY.max_new_tokens)
            num_prompt_tokens += len(prompt)
            prompt = chat(prompt, answer, row)
    stats = engine.stats()
    assert stats.num_kept_hits == 2 * len(prompts)
    # The continuous engine alone has read none of it twice.
    assert stats.num_prompt_tokens == num_prompt_tokens - stats.num_kept_tokens
    assert stats.num_kept_tokens > num_prompt_tokens / 2
    assert is_empty(engine)


SCARCE = {
    "preemption": Limits(num_places=160, max_rows=8, max_step_tokens=32, granule=4, growth_tokens=4, reserve=0.0),
    "chunks": Limits(num_places=256, max_rows=6, max_step_tokens=7, granule=1, growth_tokens=1),
    "shared prefixes": replace(ROOMY, min_prefix_tokens=8, prefix_block=4, min_prefix_rows=2),
}


@pytest.mark.parametrize(("num_steps_ahead", "template"), [(0, chat), (1, thoughtless)])
@pytest.mark.parametrize("scarcity", SCARCE)
def test_drawn_turns_are_the_same_with_and_without_keeping_and_in_both_engines(
    models: dict[str, tuple[PreTrainedModel, Decoder]], scarcity: str, num_steps_ahead: int, template: Template
) -> None:
    model, decoder = models["exaone4"]
    limits = replace(SCARCE[scarcity], prior_output_tokens=1)
    system = tuple(range(30, 42))
    first = first_turns([system + prompt for prompt in ragged_prompts(6, seed=4, longest=12)], DRAWN)
    expected = converse(padded(model), first, template)
    kept, forgotten = continuous(decoder, limits, num_steps_ahead), continuous(decoder, limits, num_steps_ahead)
    assert converse(kept, first, template) == expected
    assert converse(forgotten, first, template, keeps=False) == expected
    assert forgotten.stats().num_kept_hits == 0
    assert kept.stats().num_kept_hits > 0
    if scarcity == "preemption":
        assert kept.counters.num_preemptions > 0
        assert kept.counters.num_kept_evicted > 0
    assert kept.stats().num_prompt_tokens < forgotten.stats().num_prompt_tokens
    assert is_empty(kept)
    assert is_empty(forgotten)
    assert len({answer for (row, _, _), answer in expected.items() if row == "shard:0"}) > 3, "turns differ"


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
def test_what_was_kept_goes_with_the_memory_and_no_token_changes(
    models: dict[str, tuple[PreTrainedModel, Decoder]], num_steps_ahead: int
) -> None:
    """A step fails while turns are between two sequences: their KV is nobody's then."""
    _, decoder = models["llama"]
    first = first_turns(ragged_prompts(5, seed=2), DRAWN)
    expected = converse(continuous(decoder), first)
    device = ShortOfMemory(decoder, lambda number, step: number not in (9, 17, 18, 30, 31, 40))
    engine = continuous(device, num_steps_ahead=num_steps_ahead)
    assert converse(engine, first, delay=5) == expected
    assert device.num_failures > 3
    assert 0 < engine.stats().num_kept_hits < 2 * len(first)
    assert is_empty(engine)


def test_a_conversation_that_is_given_up_frees_what_was_kept_for_it(
    models: dict[str, tuple[PreTrainedModel, Decoder]],
) -> None:
    engine = continuous(models["llama"][1])
    (first,) = first_turns([(5, 6, 7)], GREEDY)
    engine.submit([first])
    ends: list[Generation] = []
    while not ends:
        ends = engine.step()
    assert engine.counters.num_places_used > 0
    engine.abort([first.sequence_id])
    assert engine.counters.num_places_used == 0

    engine.submit([first])
    while engine.num_unfinished:
        ends = engine.step()
    too_long = replace(next_turn(ends[0], chat).prompt, token_ids=(5,) * 600)
    engine.submit([Sequence(too_long)])
    (end,) = engine.step()
    assert end.error is not None
    assert end.error.error.startswith("turn 2 of 3: 600 prompt tokens")
    assert engine.counters.num_places_used == 0


def test_the_fake_engine_answers_each_turn_differently_and_repeatably() -> None:
    first = first_turns([(5, 6), (7, 8)], DRAWN)

    def answers() -> Answers:
        return converse(FakeEngine(), first)

    assert answers() == answers()
    assert len(set(answers().values())) == len(first) * NUM_TURNS
