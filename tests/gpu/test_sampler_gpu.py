"""The sampler on a CUDA device: the same tokens as on a CPU, and not one moment of waiting for the device."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from batchinfer.engine.nucleus import cut_top_p  # noqa: E402
from batchinfer.engine.randomness import stream_key  # noqa: E402
from batchinfer.engine.sampler import Sampler, SamplerRow  # noqa: E402
from batchinfer.records import SamplingParams  # noqa: E402

DEVICE, CPU = torch.device("cuda"), torch.device("cpu")
VOCAB = 102_400
DRAWN = SamplingParams(temperature=0.7, top_p=0.95)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Anything that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def rows(num: int) -> list[SamplerRow]:
    variants = [
        DRAWN,
        SamplingParams(),
        replace(DRAWN, top_k=50, min_p=0.01),
        replace(DRAWN, top_p=1.0, temperature=1.5),
        replace(DRAWN, repetition_penalty=1.2, min_new_tokens=4, logprobs=3),
    ]
    return [
        SamplerRow(params, stream_key(7, f"s:{index}", 0), (2, 5), (3, 4, index), (9,))
        for index in range(num)
        for params in [variants[index % len(variants)]]
    ]


def logits_of(num: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spread", [0.1, 4.0], ids=["flat", "peaked"])
def test_tokens_are_those_of_a_cpu(spread: float) -> None:
    logits = logits_of(40, spread)
    sampled = []
    for device in (CPU, DEVICE):
        sampler = Sampler(VOCAB, device)
        sampler.extend(rows(40))
        sampled.append(sampler.sample(logits.to(device)).token_ids)
    # exp differs in its last bit: a draw may fall on the other side of a border, hardly ever.
    assert sum(ours != theirs for ours, theirs in zip(*sampled, strict=True)) <= 1


@pytest.mark.parametrize("spread", [0.1, 4.0], ids=["flat", "peaked"])
def test_launching_never_waits(no_waiting: None, spread: float) -> None:
    torch.cuda.set_sync_debug_mode("default")
    logits = logits_of(64, spread).to(DEVICE)
    warm = Sampler(VOCAB, DEVICE)
    warm.extend(rows(64))
    warm.sample(logits)
    torch.cuda.set_sync_debug_mode("error")
    sampler = Sampler(VOCAB, DEVICE)
    sampler.extend(rows(60))
    first = sampler.launch(logits[:60])
    sampler.select(list(range(5, 60)))
    sampler.extend(rows(9))
    second = sampler.launch(logits)
    torch.cuda.set_sync_debug_mode("default")
    assert len(first.fetch().token_ids) == 60
    assert len(second.fetch().token_ids) == 64


@pytest.mark.parametrize("spread", [0.01, 0.3, 4.0])
def test_the_nucleus_is_that_of_a_cpu(spread: float) -> None:
    scores = logits_of(20, spread)
    weights = torch.exp((scores - scores.amax(dim=-1, keepdim=True)).double())
    top_p = torch.linspace(0.05, 0.999, 20, dtype=torch.float64)
    expected = cut_top_p(weights, top_p)
    found = cut_top_p(weights.to(DEVICE), top_p.to(DEVICE)).cpu()
    assert torch.equal(found > 0, expected > 0)
