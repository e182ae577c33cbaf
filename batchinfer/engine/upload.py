"""Small tensors from the host to the device without waiting for it.

``torch.tensor(values, device="cuda")`` and ``.to("cuda")`` of ordinary memory wait until the device has done all that
was launched before. From pinned memory the copy takes its turn like any other work.
"""

from collections.abc import Sequence

import torch

__all__ = ["upload"]


def upload(
    values: Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | Sequence[Sequence[float]],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """A tensor of the values on the device; there once the device gets to it."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # torch keeps the pinned memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)
