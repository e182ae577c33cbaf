"""The padded engine against transformers' own ``generate``, and against itself in other batches."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from batchinfer.engine.engine import Prompt, Sequence
from batchinfer.engine.padded import PaddedEngine
from batchinfer.errors import ModelError
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import (
    EOS,
    FAMILIES,
    PAD,
    VOCAB,
    drain,
    generate_alone,
    padded,
    ragged_prompts,
    sequences,
    tiny_model,
)

GREEDY = SamplingParams(max_new_tokens=24)
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, top_k=40, seed=11)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def tokens_of(engine: PaddedEngine, submitted: list[Sequence]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: end.token_ids for key, end in drain(engine, submitted).items()}


def decode(token_ids) -> str:
    """Two letters per token, so that stop strings lie across token borders."""
    return "".join(chr(97 + token % 26) + chr(97 + token // 26) for token in token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_for_every_batch_size_with_joins_and_departures(family: str) -> None:
    model = tiny_model(family)
    prompts = ragged_prompts(12, seed=1)
    limits = [3 + 7 * index % 24 for index in range(12)]
    expected = [generate_alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    overrides = {index: replace(GREEDY, max_new_tokens=limit) for index, limit in enumerate(limits)}
    for max_rows in (1, 2, 5, 12):
        engine = padded(model, max_batch_rows=max_rows)
        ends = drain(engine, sequences(prompts, GREEDY, overrides=overrides))
        for index, tokens in enumerate(expected):
            end = ends[f"shard:{index}", 0]
            assert list(end.token_ids) == tokens
            assert end.finish_reason == ("stop" if tokens[-1] == EOS else "length")
            assert end.error is None


def test_rows_submitted_while_others_run_join_them(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(20, seed=2)
    expected = [generate_alone(llama, prompt, 24) for prompt in prompts]
    engine = padded(llama, max_batch_rows=6)
    waiting = sequences(prompts, GREEDY)
    ends = {}
    largest = 0
    while engine.num_unfinished or waiting:
        engine.submit(waiting[:2])
        waiting = waiting[2:]
        ends |= {end.sequence.sequence_id: list(end.token_ids) for end in engine.step()}
        largest = max(largest, engine.stats().num_active)
    assert ends == {(f"shard:{index}", 0): tokens for index, tokens in enumerate(expected)}
    assert largest == 6


def test_a_long_prompt_joins_shorter_rows_and_long_rows_outgrow_their_buffers(llama: PreTrainedModel) -> None:
    prompts = [(5, 6), (7, 8, 9), tuple(range(3, 93)), (4,)]
    overrides = {0: replace(GREEDY, max_new_tokens=150, ignore_eos=True)}
    engine = padded(llama, max_batch_rows=3)
    submitted = sequences(prompts, GREEDY, overrides=overrides)
    engine.submit(submitted[:2])
    engine.step()
    ends = {end.sequence.sequence_id: list(end.token_ids) for end in engine.step()}
    ends |= {key: list(end.token_ids) for key, end in drain(engine, submitted[2:]).items()}
    assert ends["shard:0", 0] == generate_alone(llama, prompts[0], 150, min_new_tokens=0, eos_token_id=None)
    for index in (1, 2, 3):
        assert ends[f"shard:{index}", 0] == generate_alone(llama, prompts[index], 24)


@pytest.mark.parametrize("family", ["llama", "exaone4"])
def test_sampled_tokens_are_the_same_for_every_batch_size_and_order(family: str) -> None:
    model = tiny_model(family)
    submitted = sequences(ragged_prompts(10, seed=3), replace(DRAWN, n=2))
    expected = tokens_of(padded(model, max_batch_rows=1), submitted)
    for max_rows, seed in ((3, 1), (7, 2), (20, 3)):
        shuffled = submitted.copy()
        random.Random(seed).shuffle(shuffled)
        assert tokens_of(padded(model, max_batch_rows=max_rows), shuffled) == expected


def test_samples_of_a_prompt_differ_and_share_one_prefill(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(3, seed=4)
    engine = padded(llama, max_batch_rows=12)
    tokens = tokens_of(engine, sequences(prompts, replace(DRAWN, n=4, ignore_eos=True)))
    assert len(set(tokens.values())) == 12
    assert engine.stats().num_prompt_tokens == sum(map(len, prompts))
    assert tokens_of(padded(llama), sequences(prompts, replace(GREEDY, n=2)))["shard:0", 1] == tuple(
        generate_alone(llama, prompts[0], 24)
    )


def test_the_seed_changes_sampled_tokens_only(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(4, seed=5)
    for params, is_same in ((GREEDY, True), (DRAWN, False)):
        one = tokens_of(padded(llama), sequences(prompts, params))
        other = tokens_of(padded(llama), sequences(prompts, replace(params, seed=99)))
        assert (one == other) is is_same


def test_each_of_several_eos_ids_ends_a_row_and_is_its_last_token(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(16, seed=6)
    free = tokens_of(padded(llama), sequences(prompts, replace(GREEDY, ignore_eos=True)))
    common = [free[f"shard:{index}", 0][4] for index in (0, 1)]
    ends = drain(padded(llama, eos_token_ids=common), sequences(prompts, GREEDY))
    for key, tokens in free.items():
        first = next((place for place, token in enumerate(tokens) if token in common), None)
        expected = tokens if first is None else tokens[: first + 1]
        assert ends[key].token_ids == expected
        assert ends[key].finish_reason == ("length" if first is None else "stop")
    assert {end.finish_reason for end in ends.values()} == {"stop", "length"} or len(set(common)) == 1


def test_stop_token_ids_act_beside_eos_and_despite_ignore_eos(llama: PreTrainedModel) -> None:
    prompt = ragged_prompts(1, seed=7)
    free = tokens_of(padded(llama), sequences(prompt, replace(GREEDY, ignore_eos=True)))["shard:0", 0]
    stopped = replace(GREEDY, ignore_eos=True, stop_token_ids=(free[3],))
    end = drain(padded(llama), sequences(prompt, stopped))["shard:0", 0]
    assert end.token_ids == free[: free.index(free[3]) + 1]
    assert end.finish_reason == "stop"


def test_a_stop_string_across_token_borders_ends_the_row(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(6, seed=8)
    free = tokens_of(padded(llama), sequences(prompts, replace(GREEDY, ignore_eos=True)))
    stop = decode(free["shard:0", 0])[7:11]
    params = replace(GREEDY, ignore_eos=True, stop=(stop,))
    ends = drain(padded(llama, decode=decode), sequences(prompts, params))
    assert len(ends["shard:0", 0].token_ids) <= 6
    for key, tokens in free.items():
        count = next((n for n in range(1, 25) if stop in decode(tokens[:n])), None)
        assert ends[key].token_ids == tokens[:count]
        assert ends[key].finish_reason == ("length" if count is None else "stop")


def test_min_new_tokens_suppresses_eos_as_generate_does(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(8, seed=9)
    eos = [row[2] for row in tokens_of(padded(llama), sequences(prompts, replace(GREEDY, ignore_eos=True))).values()]
    ends = drain(padded(llama, eos_token_ids=eos), sequences(prompts, replace(GREEDY, min_new_tokens=10)))
    for index, prompt in enumerate(prompts):
        expected = generate_alone(llama, prompt, 24, min_new_tokens=10, eos_token_id=eos)
        assert list(ends[f"shard:{index}", 0].token_ids) == expected
        assert len(expected) > 10


def test_repetition_penalty_equals_generate(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(6, seed=10)
    overrides = {index: replace(GREEDY, repetition_penalty=1.3) for index in (0, 2, 5)}
    tokens = tokens_of(padded(llama, max_batch_rows=4), sequences(prompts, GREEDY, overrides=overrides))
    for index, prompt in enumerate(prompts):
        penalty = 1.3 if index in overrides else 1.0
        assert list(tokens[f"shard:{index}", 0]) == generate_alone(llama, prompt, 24, repetition_penalty=penalty)


def test_logprobs_equal_log_softmax_of_a_whole_forward_pass(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(5, seed=11)
    ends = drain(padded(llama, max_batch_rows=3), sequences(prompts, replace(DRAWN, logprobs=3)))
    for index, prompt in enumerate(prompts):
        end = ends[f"shard:{index}", 0]
        with torch.inference_mode():
            logits = llama(torch.tensor([[*prompt, *end.token_ids]])).logits[0, len(prompt) - 1 : -1]
        assert end.logprobs is not None
        assert len(end.logprobs) == len(end.token_ids)
        for expected, token_id, scored in zip(logits.log_softmax(-1), end.token_ids, end.logprobs, strict=True):
            assert scored.token_id == token_id
            assert scored.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
            best = expected.topk(3).values.tolist()
            assert [value for _, value in scored.top] == pytest.approx(best, abs=1e-4)


def test_rows_without_logprobs_have_none(llama: PreTrainedModel) -> None:
    overrides = {1: replace(GREEDY, logprobs=0)}
    ends = drain(padded(llama), sequences(ragged_prompts(3), GREEDY, overrides=overrides))
    assert [ends[f"shard:{index}", 0].logprobs is None for index in range(3)] == [True, False, True]


def test_generation_is_cut_at_the_models_length(llama: PreTrainedModel) -> None:
    prompts = [(3,) * 5, (4,) * 28]
    ends = drain(padded(llama, max_model_len=30), sequences(prompts, replace(GREEDY, ignore_eos=True)))
    assert [len(ends[f"shard:{index}", 0].token_ids) for index in (0, 1)] == [24, 2]
    assert ends["shard:1", 0].finish_reason == "length"


def test_prompts_that_cannot_be_continued_end_with_an_error_and_disturb_nobody(llama: PreTrainedModel) -> None:
    prompts = [(3,) * 30, (), (5, 6)]
    ends = drain(padded(llama, max_model_len=30), sequences(prompts, GREEDY))
    errors = [ends[f"shard:{index}", 0].error for index in range(3)]
    assert [error and error.error_type for error in errors] == ["prompt_too_long", "empty_prompt", None]
    assert list(ends["shard:2", 0].token_ids) == generate_alone(llama, (5, 6), 24)


def test_a_row_with_broken_logits_ends_alone() -> None:
    model = tiny_model("llama")
    healthy = {0: (5, 6), 2: tuple(range(8, 20)), 3: (12,)}
    expected = {index: generate_alone(model, prompt, 24) for index, prompt in healthy.items()}
    used = {token for index, prompt in healthy.items() for token in (*prompt, *expected[index])}
    poison = next(token for token in range(3, VOCAB) if token not in used)
    # In a batch of two: the second row breaks, and a shorter one takes its place.
    prompts = [healthy[0], (7, poison, *range(3, 11)), healthy[2], healthy[3]]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    ends = drain(padded(model, max_batch_rows=2), sequences(prompts, GREEDY))
    assert ends["shard:1", 0].error is not None
    assert ends["shard:1", 0].error.error_type == "not_finite"
    for index, tokens in expected.items():
        assert list(ends[f"shard:{index}", 0].token_ids) == tokens


def test_abort_forgets_waiting_and_running_rows_and_leaves_the_others_alone(llama: PreTrainedModel) -> None:
    prompts = ragged_prompts(8, seed=12)
    engine = padded(llama, max_batch_rows=4)
    engine.submit(sequences(prompts, GREEDY))
    before = {end.sequence.prompt.row_id for _ in range(3) for end in engine.step()}
    unwanted = [(f"shard:{index}", 0) for index in (0, 1, 2, 3)]
    engine.abort([*unwanted, ("unknown", 0)])
    ends = drain(engine, [])
    assert set(ends) == {(f"shard:{index}", 0) for index in (4, 5, 6, 7)} - {(row, 0) for row in before}
    for (row_id, _), end in ends.items():
        assert list(end.token_ids) == generate_alone(llama, prompts[int(row_id.split(":")[1])], 24)


def test_abort_of_a_running_row_moves_another_into_its_place(llama: PreTrainedModel) -> None:
    prompts = [(3 + index, 9, 4) for index in range(4)]
    engine = padded(llama)
    engine.submit(sequences(prompts, replace(GREEDY, repetition_penalty=1.2)))
    engine.step()
    engine.abort([("shard:0", 0)])
    ends = drain(engine, [])
    for index in (1, 2, 3):
        expected = generate_alone(llama, prompts[index], 24, repetition_penalty=1.2)
        assert list(ends[f"shard:{index}", 0].token_ids) == expected
    assert len(ends) == 3


def test_ids_outside_the_vocabulary_end_their_own_row_only(llama: PreTrainedModel) -> None:
    params = replace(GREEDY, min_new_tokens=2, stop_token_ids=(VOCAB + 5,), logprobs=VOCAB + 5)
    ends = drain(padded(llama), sequences([(3, VOCAB), (3, -1), (3, VOCAB - 1)], params))
    errors = [ends[f"shard:{index}", 0].error for index in range(3)]
    assert [error and error.error_type for error in errors] == ["bad_token_id", "bad_token_id", None]
    expected = generate_alone(llama, (3, VOCAB - 1), 24, min_new_tokens=2)
    assert list(ends["shard:2", 0].token_ids) == expected


def test_stats_count_what_happened(llama: PreTrainedModel) -> None:
    prompts = [(3, 4, 5), (6,), (7, 8)]
    engine = padded(llama)
    assert engine.stats().num_steps == 0
    engine.submit(sequences(prompts, replace(GREEDY, max_new_tokens=4, ignore_eos=True)))
    assert (engine.num_unfinished, engine.stats().num_waiting) == (3, 3)
    ends = drain(engine, [])
    stats = engine.stats()
    assert stats.num_finished == len(ends) == 3
    assert (stats.num_prompt_tokens, stats.num_completion_tokens, stats.num_padding_tokens) == (6, 12, 3)
    assert (stats.num_active, stats.num_waiting, stats.num_preemptions) == (0, 0, 0)
    assert stats.num_steps == 4


def test_an_idle_step_returns_nothing_and_close_empties_the_engine(llama: PreTrainedModel) -> None:
    engine = padded(llama)
    assert engine.step() == []
    engine.submit(sequences([(3, 4)], GREEDY))
    engine.step()
    engine.close()
    assert engine.num_unfinished == 0


def test_stop_strings_without_decode_are_refused_at_submit(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="shard:0 has stop strings"):
        padded(llama).submit(sequences([(3,)], replace(GREEDY, stop=("x",))))


def test_layers_with_another_state_than_keys_and_values_are_refused(llama: PreTrainedModel) -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        padded(model)


def test_a_waiting_short_row_is_not_overtaken_for_ever(llama: PreTrainedModel) -> None:
    """Longer rows keep coming; the short first row must end after a bounded number of them."""
    engine = padded(llama, max_batch_rows=2)
    params = replace(GREEDY, max_new_tokens=2, ignore_eos=True)
    engine.submit([Sequence(Prompt("short", (3,), params))])
    num_submitted = 0
    ended: list[str] = []
    while "short" not in ended:
        assert num_submitted < 50
        while engine.num_unfinished < 4:
            engine.submit([Sequence(Prompt(f"long:{num_submitted}", (5,) * 20, params))])
            num_submitted += 1
        ended += [end.sequence.prompt.row_id for end in engine.step()]
    assert num_submitted <= 10


@pytest.mark.slow
def test_flips_between_batch_shapes_are_rarer_than_one_in_ten_thousand() -> None:
    """Over more than 20,000 tokens sampled in batches of 1 and of 32; a row counts up to its first difference."""
    model = tiny_model("exaone4")
    params = SamplingParams(max_new_tokens=200, temperature=1.0, ignore_eos=True)
    submitted = sequences(ragged_prompts(128, seed=13), params)
    alone = tokens_of(padded(model, max_batch_rows=1), submitted)
    together = tokens_of(padded(model, max_batch_rows=32), submitted)
    num_flips = num_tokens = 0
    for key, tokens in alone.items():
        same = next((n for n, pair in enumerate(zip(tokens, together[key], strict=True)) if pair[0] != pair[1]), None)
        num_flips += same is not None
        num_tokens += len(tokens) if same is None else same + 1
    print(f"{num_flips} flips in {num_tokens} tokens")
    assert num_tokens > 20_000
    assert num_flips <= num_tokens / 10_000


def test_ids_of_the_tiny_models_are_what_the_tests_assume(llama: PreTrainedModel) -> None:
    assert (llama.config.vocab_size, llama.config.eos_token_id, llama.config.pad_token_id) == (VOCAB, EOS, PAD)
