"""top_p: which tokens are the fewest likeliest ones that reach it. Never waits for a GPU.

A threshold is found among the likeliest few. The rows where those do not reach top_p are searched in full: on a CPU
by sorting them, on a GPU by a kernel that decides for itself which rows these are.

Shape suffixes: S rows that sample, V vocabulary, K candidates.
"""

import torch

__all__ = ["cut_top_p"]

#: Likeliest tokens looked at before the whole vocabulary.
_NUM_CANDIDATES = 256


def cut_top_p(weights_SV: torch.Tensor, top_p_S: torch.Tensor) -> torch.Tensor:
    """The weights (float64, not negative) with 0 for those outside the nucleus; of equals the lower ids are in it."""
    target_S1 = (top_p_S * weights_SV.sum(dim=-1))[:, None]
    values_SK = weights_SV.topk(min(_NUM_CANDIDATES, weights_SV.shape[1]), dim=-1).values
    cumulative_SK = values_SK.cumsum(dim=-1)
    # Values before the one that reaches the target.
    last_S1 = (cumulative_SK < target_S1).sum(dim=-1, keepdim=True)
    is_known_S = last_S1[:, 0] < values_SK.shape[1]
    threshold_S = values_SK.gather(1, last_S1.clamp(max=values_SK.shape[1] - 1))[:, 0]
    if values_SK.shape[1] < weights_SV.shape[1]:
        find = _on_gpu if weights_SV.device.type == "cuda" else _by_sorting
        threshold_S = find(weights_SV, target_S1[:, 0], is_known_S, threshold_S)
    threshold_S1 = threshold_S[:, None]
    above_SV = weights_SV > threshold_S1
    equal_SV = weights_SV == threshold_S1
    missing_S1 = target_S1 - torch.where(above_SV, weights_SV, 0.0).sum(dim=-1, keepdim=True)
    num_equal_kept_S1 = (missing_S1 / threshold_S1).ceil().clamp(min=1)
    kept_SV = above_SV | (equal_SV & (equal_SV.cumsum(dim=-1) <= num_equal_kept_S1))
    return torch.where(kept_SV, weights_SV, 0.0)


def _by_sorting(
    weights_SV: torch.Tensor, target_S: torch.Tensor, is_known_S: torch.Tensor, threshold_S: torch.Tensor
) -> torch.Tensor:
    rows = torch.nonzero(~is_known_S)[:, 0]
    if not len(rows):
        return threshold_S
    values_XV = weights_SV[rows].sort(dim=-1, descending=True).values
    last_X1 = (values_XV.cumsum(dim=-1) < target_S[rows, None]).sum(dim=-1, keepdim=True)
    # The clamp is for a top_p so near 1 that rounding never reaches it.
    return threshold_S.index_put((rows,), values_XV.gather(1, last_X1.clamp(max=values_XV.shape[1] - 1))[:, 0])


def _on_gpu(
    weights_SV: torch.Tensor, target_S: torch.Tensor, is_known_S: torch.Tensor, threshold_S: torch.Tensor
) -> torch.Tensor:
    # Imports triton, which a machine without a GPU need not have.
    from batchinfer.engine.kernels_sampling import nucleus_thresholds

    return nucleus_thresholds(weights_SV, target_S, is_known_S, threshold_S)
