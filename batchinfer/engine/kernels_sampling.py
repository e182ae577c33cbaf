"""Searches over the whole vocabulary that only some rows need, in Triton: which ones, the device alone has to know.

Shapes: S rows that sample, V vocabulary.
"""
# Kernels are Triton's language, not Python: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl

__all__ = ["nucleus_thresholds"]

_BLOCK = 4096


@triton.jit
def nucleus_kernel(bits_SV, target_S, is_known_S, threshold_S, V, BLOCK: tl.constexpr):
    """The largest weight that, with all larger ones, reaches the row's target: grid (S,). 0 if none does.

    Weights are not negative, so their bits read as integers have their order. Rows that are known are left as they
    are; of the others ``threshold_S`` holds a weight that is too large. Each pass halves the interval and then
    narrows it to weights that occur: about as many passes as the vocabulary's number has bits.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(is_known_S + row) == 0:
        target = tl.load(target_S + row)
        high = tl.load(threshold_S + row)
        low = high * 0
        v = tl.arange(0, BLOCK)
        while high - low > 1:
            middle = low + (high - low) // 2
            totals = tl.zeros((BLOCK,), tl.float64)
            least = tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64)
            most = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, V, BLOCK):
                bits = tl.load(bits_SV + row * V + start + v, mask=start + v < V, other=0)
                is_above = bits >= middle
                totals += tl.where(is_above, bits.to(tl.float64, bitcast=True), 0.0)
                least = tl.minimum(least, tl.where(is_above, bits, 0x7FFFFFFFFFFFFFFF))
                most = tl.maximum(most, tl.where(is_above, 0, bits))
            reaches = tl.sum(totals, 0) >= target
            low = tl.where(reaches, tl.min(least, 0), low)
            high = tl.where(reaches, high, tl.max(most, 0) + 1)
        tl.store(threshold_S + row, low)


def nucleus_thresholds(
    weights_SV: torch.Tensor, target_S: torch.Tensor, is_known_S: torch.Tensor, threshold_S: torch.Tensor
) -> torch.Tensor:
    """``threshold_S`` (float64) with the rows completed that are not known; see the kernel. Never waits."""
    weights_SV = weights_SV.contiguous()
    found_S = threshold_S.clone()
    num_rows, vocab_size = weights_SV.shape
    if num_rows:
        nucleus_kernel[(num_rows,)](
            weights_SV.view(torch.int64),
            target_S.contiguous(),
            is_known_S.contiguous(),
            found_S.view(torch.int64),
            vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return found_S
