"""top_p on a CPU against its definition, and the kernel that searches on a GPU against the sort it stands for."""

import importlib.util

import pytest
import torch

from batchinfer.engine.nucleus import _by_sorting, cut_top_p
from batchinfer.engine.upload import upload

CPU = torch.device("cpu")


def weights_of(num_rows: int, vocab_size: int, spread: float, seed: int = 0) -> torch.Tensor:
    """As the sampler makes them: float64, 1 for the likeliest."""
    scores = spread * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return torch.exp((scores - scores.amax(dim=-1, keepdim=True)).double())


def nucleus(weights: list[float], top_p: float) -> set[int]:
    """By definition: ids in the order of their weights, the lower first among equals, until they reach the share."""
    target, reached = top_p * sum(weights), 0.0
    kept: set[int] = set()
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        if kept and reached >= target:
            break
        kept.add(index)
        reached += weights[index]
    return {index for index in kept if weights[index] > 0}


@pytest.mark.parametrize("vocab_size", [1, 7, 256, 257, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_fewest_likeliest_tokens_that_reach_top_p_are_kept(vocab_size: int, spread: float) -> None:
    weights = weights_of(8, vocab_size, spread, seed=vocab_size)
    weights[3] = weights[3].where(weights[3] > 0.01, 0.0)
    top_p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.95, 0.99, 0.9999, 0.7], dtype=torch.float64)
    for kept, whole, share in zip(cut_top_p(weights, top_p), weights, top_p.tolist(), strict=True):
        assert set(torch.nonzero(kept)[:, 0].tolist()) == nucleus(whole.tolist(), share)
        assert torch.equal(kept[kept > 0], whole[kept > 0])


@pytest.mark.parametrize("num_equal", [5, 300, 1000])
def test_of_equals_the_lower_ids_are_kept(num_equal: int) -> None:
    """Also where more of them are needed than there are candidates."""
    weights = torch.cat((torch.full((10,), 0.25), torch.ones(num_equal), torch.full((10,), 0.5)))[None].double()
    for share in (0.2, 0.5, 0.9):
        kept = cut_top_p(weights, torch.tensor([share], dtype=torch.float64))[0]
        assert set(torch.nonzero(kept)[:, 0].tolist()) == nucleus(weights[0].tolist(), share)


def test_uploading_gives_the_values_in_the_dtype() -> None:
    assert upload([3, 1], torch.long, CPU).tolist() == [3, 1]
    assert upload([[0.5, 1]], torch.float64, CPU).dtype == torch.float64
    assert upload([], torch.long, CPU).shape == (0,)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu/test_sampler_gpu.py runs it there")
class TestKernelInTheInterpreter:
    @pytest.mark.parametrize(("vocab_size", "spread"), [(300, 0.5), (5000, 0.01), (5000, 3.0)])
    def test_it_finds_what_sorting_finds_for_the_rows_that_are_not_known(self, vocab_size: int, spread: float) -> None:
        from batchinfer.engine.kernels_sampling import nucleus_thresholds

        weights = weights_of(6, vocab_size, spread)
        weights[4] = weights[4].where(weights[4] > 0.3, 0.0)
        # As many equal ones at the border as there are blocks.
        weights[5, ::7] = weights[5].median()
        shares = torch.tensor([0.5, 0.9, 0.99, 0.999, 0.9, 0.6], dtype=torch.float64)
        target = shares * weights.sum(dim=-1)
        known = torch.tensor([False, False, True, False, False, False])
        too_large = weights.amax(dim=-1)
        expected = _by_sorting(weights, target, known, too_large)
        assert torch.equal(nucleus_thresholds(weights, target, known, too_large), expected)
        assert expected[2] == 1.0
        assert (expected[[0, 1, 3, 4, 5]] < 1.0).all()

    def test_targets_out_of_reach_and_weights_that_are_no_numbers_end_it_too(self) -> None:
        from batchinfer.engine.kernels_sampling import nucleus_thresholds

        weights = weights_of(3, 50, 1.0)
        weights[1, 7] = torch.nan
        target = torch.tensor([1e9, 1.5, torch.nan], dtype=torch.float64)
        found = nucleus_thresholds(weights, target, torch.zeros(3, dtype=torch.bool), weights.nan_to_num().amax(dim=-1))
        assert found[0] == 0.0
        assert nucleus_thresholds(weights[:0], target[:0], target[:0] > 0, target[:0]).shape == (0,)
