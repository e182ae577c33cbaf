from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel

from batchinfer.engine.build import build_engine
from batchinfer.engine.padded import PaddedEngine
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import EOS, PAD, drain, generate_alone, sequences, tiny_model


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    eos_token_ids: tuple[int, ...] = (EOS,)
    pad_token_id: int = PAD
    max_model_len: int = 64


def test_auto_and_padded_build_the_padded_engine_with_the_given_limits() -> None:
    model = tiny_model("llama")
    for kind in ("auto", "padded"):
        engine: Any = build_engine(kind, Loaded(model), max_batch_rows=3, max_batch_tokens=99)
        assert isinstance(engine, PaddedEngine)
        assert (engine.capacity, engine.limits.max_tokens) == (3, 99)
        ends = drain(engine, sequences([(5, 6)], SamplingParams(max_new_tokens=5)))
        assert list(ends["shard:0", 0].token_ids) == generate_alone(model, (5, 6), 5)


def test_anything_with_the_four_facts_can_be_served() -> None:
    loaded = SimpleNamespace(model=tiny_model("llama"), eos_token_ids=(EOS,), pad_token_id=PAD, max_model_len=8)
    ends = drain(build_engine("auto", loaded), sequences([(5, 6)], SamplingParams(max_new_tokens=50, ignore_eos=True)))
    assert len(ends["shard:0", 0].token_ids) == 6
