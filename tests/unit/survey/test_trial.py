"""Measuring an engine."""

from dataclasses import replace

import pytest

from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.errors import ModelError
from batchinfer.records import Prompt, SamplingParams
from batchinfer.survey.trial import measure

PROMPTS = [
    Prompt(f"s:{number}", list(range(10 + number % 5)), SamplingParams(max_new_tokens=20)) for number in range(64)
]


def engine(**behaviour: float) -> FakeEngine:
    return FakeEngine(FakeBehaviour(**behaviour), vocab_size=1000, reserved=0, capacity=16)  # type: ignore[arg-type]


def test_reading_and_generating_are_measured_apart() -> None:
    measured = measure(engine(), PROMPTS, prefill_s=0.2, decode_s=5.0)
    assert measured.prefill_tokens_per_s > 0
    assert measured.decode_tokens_per_s > 0
    assert measured.num_sequences == measured.num_ended == 16
    assert measured.mean_completion_tokens is not None
    assert 1 <= measured.mean_completion_tokens <= 20
    assert 16 <= measured.num_completion_tokens <= 16 * 20


def test_what_has_not_ended_in_time_tells_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.survey.trial._DECODE_PREFILL_S", 0.01)
    slow = engine(tokens_per_s=300.0)
    long = SamplingParams(max_new_tokens=1000, min_new_tokens=1000)
    prompts = [replace(prompt, sampling=long) for prompt in PROMPTS[:8]]
    measured = measure(slow, prompts, prefill_s=0.01, decode_s=0.2)
    assert measured.mean_completion_tokens is None
    assert measured.num_ended < measured.num_sequences
    assert slow.num_unfinished == 0, "what was left was forgotten"


def test_too_few_prompts_are_told() -> None:
    with pytest.raises(ModelError, match="raise --sample"):
        measure(engine(), PROMPTS[:4])
