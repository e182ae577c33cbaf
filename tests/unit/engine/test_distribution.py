"""What comes out of the whole continuous engine is distributed as the model says, cuts included."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import VOCAB, drain, sequences, tiny_decoder, tiny_model

NUM_SAMPLES = 3000
PROMPT = (5, 17, 60, 33, 8)
DRAWN = SamplingParams(max_new_tokens=2, temperature=1.0, ignore_eos=True, n=NUM_SAMPLES, seed=3)
LIMITS = Limits(num_places=16 * 1024, max_rows=1024, max_step_tokens=2048, min_prefix_tokens=4)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def decoder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(model, tmp_path_factory.mktemp("llama"))


def probabilities(model: PreTrainedModel, tokens: tuple[int, ...], params: SamplingParams) -> torch.Tensor:
    """Of the token after these, by transformers' own model and warpers; 0 where they cut it off."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[:, -1]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(dim=-1)[0].double()


def assert_drawn_from(expected_V: torch.Tensor, drawn: list[int]) -> int:
    """Chi-square at its 0.1 % point, tokens expected less than five times taken together; the number of classes."""
    counts_V = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    assert counts_V[expected_V == 0].sum() == 0, "a token that is cut off was drawn"
    expected_V = expected_V * len(drawn)
    is_common = expected_V >= 5
    expected, counts = expected_V[is_common], counts_V[is_common]
    rest = float(expected_V[~is_common].sum())
    if rest >= 5:
        expected = torch.cat((expected, torch.tensor([rest], dtype=torch.float64)))
        counts = torch.cat((counts, counts_V[~is_common].sum()[None]))
    freedom = len(expected) - 1
    assert (counts > 0).all(), "a token that is kept was never drawn"
    # Wilson and Hilferty's approximation of the quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert float(((counts - expected) ** 2 / expected).sum()) < limit
    return len(expected)


@pytest.mark.parametrize(
    "params",
    [
        DRAWN,
        replace(DRAWN, temperature=0.6),
        replace(DRAWN, temperature=2.5),
        replace(DRAWN, temperature=2.0, top_k=9),
        replace(DRAWN, temperature=2.0, top_p=0.8),
        replace(DRAWN, temperature=2.0, min_p=0.1),
        replace(DRAWN, temperature=3.0, top_k=40, top_p=0.9, min_p=0.02),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "min_p", "all cuts"],
)
def test_samples_of_a_prompt_have_the_models_distribution(
    model: PreTrainedModel, decoder: Decoder, params: SamplingParams
) -> None:
    """At the first position for all of them, at the second for those that share the commonest first token."""
    kv = kv_cache.allocate(decoder.config, LIMITS.num_places, torch.float32, torch.device("cpu"))
    engine = ContinuousEngine(decoder, kv, LIMITS, eos_token_ids=[], max_model_len=64)
    ends = drain(engine, sequences([PROMPT], params))
    assert engine.stats().num_prefix_hits == NUM_SAMPLES
    expected_V = probabilities(model, PROMPT, params)
    num_classes = assert_drawn_from(expected_V, [end.token_ids[0] for end in ends.values()])
    assert num_classes >= 4
    if params.top_k == 9:
        assert int((expected_V > 0).sum()) == 9
    commonest = int(expected_V.argmax())
    seconds = [end.token_ids[1] for end in ends.values() if end.token_ids[0] == commonest]
    assert len(seconds) > 100
    assert_drawn_from(probabilities(model, (*PROMPT, commonest), params), seconds)
