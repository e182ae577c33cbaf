"""Matrix products with weights that never change: as they are, or packed once for the CPU."""

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["Linear", "PackedLinear", "PlainLinear", "linear"]

#: What oneDNN is told to pack for. Measured from 1 to 512 rows: it packs the same way for 32, 128 and 512.
_PACKED_FOR_ROWS = 128


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """``x_TI @ weight_OI.T + bias_O``."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The same in bfloat16 on a CPU, from weights in oneDNN's own blocked layout, which no other operation can read.

    Plain weights are packed anew in every call: of one row's time that is half, of 128 rows' a tenth.
    """

    packed: torch.Tensor
    bias_O: torch.Tensor | None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.packed, self.bias_O, "none", [], "")
        return product


Linear = PlainLinear | PackedLinear


def linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Linear:
    """The fastest form for where the weight lies. A packed form holds a copy: let go of the weight then."""
    if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16 and _can_pack():
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_FOR_ROWS), bias_O)
    return PlainLinear(weight_OI, bias_O)


def _can_pack() -> bool:
    """Whether this torch has oneDNN's fused linear (an internal of inductor) and the CPU bfloat16 for it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    return (
        hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_is_mkldnn_bf16_supported")
        and bool(ops._is_mkldnn_bf16_supported())
    )
