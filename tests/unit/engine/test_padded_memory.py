"""The padded engine when memory ends: limits halve, rows start over, results stay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchinfer.engine.padded_limits import check_layers, default_limits, kv_bytes_per_token
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import drain, generate_alone, padded, ragged_prompts, sequences, tiny_model

GREEDY = SamplingParams(max_new_tokens=24)
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.9, seed=5, n=2, logprobs=1, repetition_penalty=1.1)

#: Rows and columns of input ids, columns of KV -> whether the device's memory is too small for them.
Fits = Callable[[int, int, int], bool]


def starve(model: Any, fits: Fits, cpu_text: str = "") -> list[tuple[int, int, int]]:
    """Make the model's forward raise as a full GPU would, or with ``cpu_text`` as a full host.

    Returns the list of shapes it has seen.
    """
    real = model.forward
    seen: list[tuple[int, int, int]] = []

    def forward(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0
    ):
        shape = (*input_ids.shape, attention_mask.shape[1])
        seen.append(shape)
        if not fits(*shape):
            raise RuntimeError(cpu_text) if cpu_text else torch.OutOfMemoryError(f"no room for {shape}")
        return real(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    model.forward = forward
    return seen


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("prefill", lambda rows, columns, kv: rows <= 3),
        ("decode", lambda rows, columns, kv: columns > 1 or rows <= 3),
        ("width", lambda rows, columns, kv: rows * kv <= 120),
    ],
)
@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_results_are_the_same_when_memory_is_short(name: str, fits: Fits, params: SamplingParams) -> None:
    submitted = sequences(ragged_prompts(12, seed=1), params)
    undisturbed = drain(padded(tiny_model("exaone4")), submitted)
    model = tiny_model("exaone4")
    starve(model, fits)
    engine = padded(model, max_batch_rows=24)
    ends = drain(engine, submitted)
    assert {key: (end.token_ids, end.finish_reason) for key, end in ends.items()} == {
        key: (end.token_ids, end.finish_reason) for key, end in undisturbed.items()
    }
    for key, end in ends.items():
        for scored, expected in zip(end.logprobs or (), undisturbed[key].logprobs or (), strict=True):
            assert scored.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert engine.limits.max_tokens < padded(model).limits.max_tokens
    if name != "prefill":
        assert engine.stats().num_preemptions > 0


def test_a_cpu_without_memory_is_a_lack_of_memory_too() -> None:
    submitted = sequences(ragged_prompts(6, seed=1), GREEDY)
    undisturbed = {key: end.token_ids for key, end in drain(padded(tiny_model("llama")), submitted).items()}
    model = tiny_model("llama")
    starve(model, lambda rows, columns, kv: rows <= 2, "DefaultCPUAllocator: can't allocate memory: you tried to")
    assert {key: end.token_ids for key, end in drain(padded(model), submitted).items()} == undisturbed


def test_after_running_out_the_batch_is_halved_and_not_single_file() -> None:
    model = tiny_model("llama")
    shapes = starve(model, lambda rows, columns, kv: rows <= 8)
    drain(padded(model, max_batch_rows=32), sequences([(3, 4, 5)] * 32, replace(GREEDY, ignore_eos=True)))
    failures = [rows for rows, _, _ in shapes if rows > 8]
    assert len(failures) <= 3
    assert max(rows for rows, _, _ in shapes if rows <= 8) >= 4


def test_a_row_that_does_not_fit_alone_ends_with_an_error_and_the_others_complete() -> None:
    prompts = [*ragged_prompts(6, seed=2, longest=10), tuple(range(3, 63))]
    expected = [generate_alone(tiny_model("llama"), prompt, 24) for prompt in prompts]
    model = tiny_model("llama")
    starve(model, lambda rows, columns, kv: kv <= 50)
    engine = padded(model)
    ends = drain(engine, sequences(prompts, GREEDY))
    error = ends["shard:6", 0].error
    assert error is not None
    assert error.error_type == "out_of_memory"
    assert [list(ends[f"shard:{index}", 0].token_ids) for index in range(6)] == expected[:6]


def test_an_error_of_the_model_itself_is_not_taken_for_a_lack_of_memory() -> None:
    model = tiny_model("llama")

    def broken(**arguments: Any) -> None:
        raise RuntimeError("a kernel failed")

    model.forward = broken
    engine = padded(model)
    # The names of forward's arguments are read when the engine is made; this one takes any.
    engine.submit(sequences([(3,)], GREEDY))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()


def test_rows_are_preempted_before_the_batch_outgrows_max_batch_tokens() -> None:
    """Completions longer than expected: the newest rows go back, and continue where they were."""
    prompts = ragged_prompts(10, seed=3, longest=12)
    params = replace(GREEDY, max_new_tokens=120, ignore_eos=True)
    expected = [generate_alone(tiny_model("llama"), prompt, 120, eos_token_id=None) for prompt in prompts]
    model = tiny_model("llama")
    shapes = starve(model, lambda rows, columns, kv: True)
    engine = padded(model, max_batch_rows=10, max_batch_tokens=700)
    ends = drain(engine, sequences(prompts, params))
    assert [list(ends[f"shard:{index}", 0].token_ids) for index in range(10)] == expected
    assert engine.stats().num_preemptions > 0
    assert all(rows * kv <= 700 for rows, columns, kv in shapes if columns == 1)


def test_memory_lost_after_rows_have_taken_their_tokens_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. Rows end in a step. 2. Moving the cache's rows fails for lack of memory. 3. The ends come out once."""
    submitted = sequences(ragged_prompts(9, seed=4), GREEDY)
    undisturbed = {key: end.token_ids for key, end in drain(padded(tiny_model("llama")), submitted).items()}
    engine = padded(tiny_model("llama"), max_batch_rows=9)
    real = engine._cache.remove_rows
    num_calls = 0

    def remove_rows(moves, num_left):
        nonlocal num_calls
        num_calls += 1
        if num_calls % 2:
            raise torch.OutOfMemoryError("no room to move")
        real(moves, num_left)

    monkeypatch.setattr(engine._cache, "remove_rows", remove_rows)
    assert {key: end.token_ids for key, end in drain(engine, submitted).items()} == undisturbed


def test_rows_that_ended_in_their_prefill_do_not_start_again_when_memory_ends_right_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted = sequences(ragged_prompts(6, seed=5), replace(GREEDY, max_new_tokens=1))
    undisturbed = {key: end.token_ids for key, end in drain(padded(tiny_model("llama")), submitted).items()}
    engine = padded(tiny_model("llama"))

    def extend(rows):
        raise torch.OutOfMemoryError("no room for the sampler's tensors")

    monkeypatch.setattr(engine._sampler, "extend", extend)
    assert {key: end.token_ids for key, end in drain(engine, submitted, max_steps=20).items()} == undisturbed


def test_default_limits_come_from_the_device_and_give_way_to_arguments() -> None:
    model = tiny_model("llama")
    assert kv_bytes_per_token(model.config, torch.float32) == 2 * 2 * 2 * 8 * 4
    limits = default_limits(model, None, None)
    assert limits.max_rows > 1
    assert limits.max_tokens * kv_bytes_per_token(model.config, torch.float32) > 2**20
    given = default_limits(model, 5, 77)
    assert (given.max_rows, given.max_tokens) == (5, 77)
    check_layers(model.config)
