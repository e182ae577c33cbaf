from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchinfer.engine.randomness import stream_key
from batchinfer.engine.sampler import Cuts, Sampler, SamplerRow, draw, keep_weights
from batchinfer.records import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0)


def row(params: SamplingParams, name: str = "s:0", *, stop: tuple[int, ...] = (), prompt=(3, 4), generated=()):
    return SamplerRow(params, stream_key(params.seed, name, 0), stop, prompt, generated)


def kept(scores: torch.Tensor, params: SamplingParams) -> list[set[int]]:
    num = scores.shape[0]
    columns = torch.tensor([[params.temperature, params.top_k, params.top_p, params.min_p]] * num, dtype=torch.float64)
    weights = keep_weights(scores, [Cuts(params.top_k, params.top_p, params.min_p)] * num, columns)
    return [set(torch.nonzero(line)[:, 0].tolist()) for line in weights]


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_greedy_takes_the_highest_logit_and_the_lowest_id_among_equals() -> None:
    sampler = Sampler(5, CPU)
    sampler.extend([row(GREEDY), row(GREEDY)])
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert sampler.sample(logits).token_ids == [1, 0]
    assert sampler.sample(logits.bfloat16()).token_ids == [1, 0]


def test_top_k_keeps_the_k_best_and_all_equal_to_the_last() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 3.0, 0.0]])
    assert kept(scores, replace(DRAWN, top_k=1)) == [{1}]
    assert kept(scores, replace(DRAWN, top_k=2)) == [{1, 2, 3}]
    assert kept(scores, replace(DRAWN, top_k=99)) == [{0, 1, 2, 3, 4}]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    scores = log(0.1, 0.4, 0.2, 0.3)
    assert kept(scores, replace(DRAWN, top_p=0.39)) == [{1}]
    assert kept(scores, replace(DRAWN, top_p=0.69)) == [{1, 3}]
    assert kept(scores, replace(DRAWN, top_p=0.71)) == [{1, 2, 3}]
    assert kept(scores, replace(DRAWN, top_p=0.95)) == [{0, 1, 2, 3}]
    assert kept(scores, replace(DRAWN, top_p=1e-9)) == [{1}]


def test_top_p_prefers_the_lower_id_among_equals() -> None:
    assert kept(torch.zeros(1, 8), replace(DRAWN, top_p=0.5)) == [{0, 1, 2, 3}]
    assert kept(torch.zeros(1, 600), replace(DRAWN, top_p=0.5)) == [set(range(300))]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    scores = log(0.1, 0.4, 0.2, 0.3)
    assert kept(scores, replace(DRAWN, top_k=2, top_p=0.5)) == [{1}]
    assert kept(scores, replace(DRAWN, top_k=2, top_p=0.6)) == [{1, 3}]


def test_min_p_is_relative_to_the_likeliest() -> None:
    scores = log(0.1, 0.4, 0.21, 0.29)
    assert kept(scores, replace(DRAWN, min_p=0.5)) == [{1, 2, 3}]
    assert kept(scores, replace(DRAWN, min_p=0.6)) == [{1, 3}]
    assert kept(scores, replace(DRAWN, min_p=1.0)) == [{1}]


@pytest.mark.parametrize("vocab_size", [50, 700])
def test_cuts_keep_what_transformers_warpers_keep(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    scores = 3 * torch.randn(40, vocab_size, generator=generator)
    for params in (
        replace(DRAWN, temperature=0.7, top_p=0.9),
        replace(DRAWN, temperature=1.5, top_k=20),
        replace(DRAWN, temperature=3.0, top_k=30, top_p=0.8, min_p=0.05),
        replace(DRAWN, temperature=5.0, top_p=0.99),
    ):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
        if params.top_k:
            warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            warpers.append(MinPLogitsWarper(params.min_p))
        warped = warpers(torch.zeros(40, 1, dtype=torch.long), scores.clone())
        assert kept(scores, params) == [set(torch.nonzero(line > -torch.inf)[:, 0].tolist()) for line in warped]


def test_repetition_penalty_equals_transformers_processor() -> None:
    generator = torch.Generator().manual_seed(1)
    params = replace(GREEDY, repetition_penalty=1.7)
    sampler = Sampler(30, CPU)
    histories = [[3, 4, 9], [5, 5, 6]]
    sampler.extend([row(params, prompt=tuple(h[:2]), generated=tuple(h[2:])) for h in histories])
    for _ in range(12):
        logits = torch.randn(2, 30, generator=generator)
        processed = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(histories), logits.clone())
        assert sampler.sample(logits).token_ids == processed.argmax(-1).tolist()
        for history, token in zip(histories, processed.argmax(-1).tolist(), strict=True):
            history.append(token)


def test_repetition_penalty_stays_with_its_row_when_others_come_and_go() -> None:
    params = replace(GREEDY, repetition_penalty=100.0)
    logits = torch.arange(1.0, 7.0).flip(0)
    sampler = Sampler(6, CPU)
    sampler.extend([row(GREEDY), row(params, prompt=(0,))])
    assert sampler.sample(logits.expand(2, 6)).token_ids == [0, 1]
    sampler.select([1])
    sampler.extend([row(params, prompt=(1,), generated=(0,)), row(GREEDY)])
    assert sampler.sample(logits.expand(3, 6)).token_ids == [2, 2, 0]
    sampler.select([2])
    assert sampler.sample(logits.expand(1, 6)).token_ids == [0]


def test_min_new_tokens_equals_transformers_processor() -> None:
    params = replace(GREEDY, min_new_tokens=2)
    sampler = Sampler(6, CPU)
    sampler.extend([row(params, stop=(5, 4)), row(GREEDY, stop=(5, 4))])
    logits = torch.arange(6.0).expand(2, 6)
    processor = MinNewTokensLengthLogitsProcessor(2, 2, torch.tensor([5, 4]))
    for length in (2, 3, 4):
        expected = processor(torch.zeros(1, length, dtype=torch.long), logits[:1].clone()).argmax(-1).item()
        assert sampler.sample(logits).token_ids == [expected, 5]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 20, generator=generator)
    sampler = Sampler(20, CPU)
    hot = replace(DRAWN, temperature=2.0, top_k=3, repetition_penalty=2.0, logprobs=4)
    sampler.extend([row(hot), row(GREEDY), row(replace(GREEDY, logprobs=0))])
    sampled = sampler.sample(logits)
    expected = logits.log_softmax(-1)
    assert set(sampled.logprobs) == {0, 2}
    first = sampled.logprobs[0]
    assert first.token_id == sampled.token_ids[0]
    assert first.logprob == expected[0, first.token_id].item()
    best = expected[0].topk(4)
    assert first.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert sampled.logprobs[2].top == ()


@pytest.mark.parametrize("params", [DRAWN, replace(DRAWN, temperature=0.5, top_k=4), replace(DRAWN, top_p=0.8)])
def test_frequencies_are_the_models_probabilities(params: SamplingParams) -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, 1.5])
    num = 4000
    sampler = Sampler(6, CPU)
    sampler.extend([row(params, f"s:{index}") for index in range(num)])
    counts = torch.zeros(6)
    for _ in range(3):
        counts += torch.bincount(sampler.sample(logits.expand(num, 6)).tokens, minlength=6)
    columns = torch.tensor([[params.temperature, params.top_k, params.top_p, 0.0]], dtype=torch.float64)
    weights = keep_weights(logits[None], [Cuts(params.top_k, params.top_p, 0.0)], columns)[0]
    expected = 3 * num * weights / weights.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # The 0.1 % point for five degrees of freedom; fewer kept tokens only make it harder to reach.
    assert chi_square < 20.5


def test_a_draw_is_the_same_alone_and_in_any_company() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 40, generator=generator)
    params = [replace(DRAWN, temperature=0.3 + 0.2 * i, top_p=1 - 0.05 * i, top_k=(0, 7)[i % 2]) for i in range(9)]
    rows = [row(p, f"s:{i}", generated=(1,) * i) for i, p in enumerate(params)]
    together = Sampler(40, CPU)
    together.extend(rows)
    tokens = together.sample(logits).token_ids
    for index in range(9):
        alone = Sampler(40, CPU)
        alone.extend([rows[index]])
        assert alone.sample(logits[index : index + 1]).token_ids == [tokens[index]]


def test_positions_advance_and_survive_a_new_start() -> None:
    logits = torch.zeros(1, 1000)
    steady = Sampler(1000, CPU)
    steady.extend([row(DRAWN)])
    tokens = [steady.sample(logits).token_ids[0] for _ in range(6)]
    assert len(set(tokens)) > 3
    resumed = Sampler(1000, CPU)
    resumed.extend([row(DRAWN, generated=tuple(tokens[:3]))])
    assert [resumed.sample(logits).token_ids[0] for _ in range(3)] == tokens[3:]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1.0 - 2.0**-53, 3)])
def test_the_extreme_uniforms_end_on_the_first_and_the_last_kept_token(uniform: float, expected: int) -> None:
    columns = torch.tensor([[1.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.9, -6.0]])
    token = draw(scores, [Cuts(2, 1.0, 0.0)], columns, torch.tensor([uniform], dtype=torch.float64))
    assert token.tolist() == [expected]


def test_tiny_temperatures_are_greedy_and_do_not_overflow() -> None:
    sampler = Sampler(4, CPU)
    sampler.extend([row(replace(DRAWN, temperature=1e-30))])
    sampled = sampler.sample(torch.tensor([[1e30, 2e30, -3e30, 0.0]]))
    assert sampled.token_ids == [1]
    assert sampled.is_finite == [True]


def test_rows_without_usable_logits_are_reported() -> None:
    sampler = Sampler(3, CPU)
    sampler.extend([row(GREEDY), row(DRAWN), row(DRAWN), row(DRAWN)])
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0], [nan, nan, nan], [0.0, inf, 0.0], [0.0, 1.0, -inf]])
    assert sampler.sample(logits).is_finite == [False, False, False, True]
