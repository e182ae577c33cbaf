"""The six functions of ``Ops`` on a CPU: compiled kernels where torch would go over memory again and again.

Torch takes an operation, and a pass over memory, for each rounding and each sum, and none of these passes is long
enough to share among threads. What is matrix products, the attention of prompts, stays torch's.
"""

import numba
import numpy as np
import torch

from batchinfer.engine import kernels_cpu
from batchinfer.engine.step_tensors import DecodeTensors
from batchinfer.engine.torch_ops import TorchOps

__all__ = ["CpuOps"]

_Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]] | np.ndarray[tuple[int, ...], np.dtype[np.uint16]]

_NO_WEIGHT = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
_GATED = {"silu": kernels_cpu.silu_mul, "gelu_tanh": kernels_cpu.gelu_tanh_mul}


def _start_threads() -> int:
    """Numba's threads; how many there are. It sets OpenMP's number to its own, and so torch's, which is put back."""
    num_threads = torch.get_num_threads()
    num_started = numba.get_num_threads()
    torch.set_num_threads(num_threads)
    return num_started


#: Elements from which on threads are quicker than one: they must meet, and find their data in each other's caches.
_MIN_SHARED_ELEMENTS = 1 << 16
#: One thread for each core that the process may use.
_MAX_WORKERS = _start_threads()


class CpuOps(TorchOps):
    """``Ops`` for float32 and bfloat16 in host memory."""

    def add_rms_norm(
        self,
        residual_TE: torch.Tensor,
        delta_TE: torch.Tensor | None,
        weight_E: torch.Tensor,
        eps: float,
        unit_offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`batchinfer.engine.ops.Ops`."""
        normed_TE = torch.empty_like(residual_TE)
        kernels_cpu.add_rms_norm(
            _array(residual_TE),
            _array(residual_TE if delta_TE is None else delta_TE),
            delta_TE is not None,
            _array(weight_E),
            np.float32(eps),
            np.float32(unit_offset),
            _array(normed_TE),
            _num_workers(residual_TE.numel()),
        )
        return residual_TE, normed_TE

    def rope_and_write(
        self,
        qkv_TX: torch.Tensor,
        cos_PD2: torch.Tensor,
        sin_PD2: torch.Tensor,
        positions_T: torch.Tensor,
        places_T: torch.Tensor,
        keys_NKD: torch.Tensor,
        values_NKD: torch.Tensor,
        num_heads: int,
        q_norm_D: torch.Tensor | None,
        k_norm_D: torch.Tensor | None,
        eps: float,
        rotary: bool,
    ) -> torch.Tensor:
        """See :class:`batchinfer.engine.ops.Ops`."""
        num_tokens, (num_kv, head_dim) = len(qkv_TX), keys_NKD.shape[1:]
        q_THD = qkv_TX.new_empty(num_tokens, num_heads, head_dim)
        none = _NO_WEIGHT[qkv_TX.dtype]
        kernels_cpu.rope_and_write(
            _array(qkv_TX.view(num_tokens, num_heads + 2 * num_kv, head_dim)),
            (cos_PD2 if rotary else cos_PD2[:, :0]).numpy(),
            (sin_PD2 if rotary else sin_PD2[:, :0]).numpy(),
            positions_T.numpy(),
            places_T.numpy(),
            _array(keys_NKD),
            _array(values_NKD),
            q_norm_D is not None,
            _array(none if q_norm_D is None else q_norm_D),
            _array(none if k_norm_D is None else k_norm_D),
            np.float32(eps),
            _array(q_THD),
            _num_workers(qkv_TX.numel()),
        )
        return q_THD

    def decode_attention(
        self,
        q_RHD: torch.Tensor,
        keys_NKD: torch.Tensor,
        values_NKD: torch.Tensor,
        rows: DecodeTensors,
        scale: float,
        soft_cap: float,
        window: int,
    ) -> torch.Tensor:
        """See :class:`batchinfer.engine.ops.Ops`."""
        out_RHD = torch.empty_like(q_RHD)
        longest = rows.max_length + (rows.groups.max_length if rows.groups is not None else 0)
        kernels_cpu.decode_attention(
            _array(q_RHD),
            _array(keys_NKD),
            _array(values_NKD),
            rows.offsets_R.numpy(),
            rows.lengths_R.numpy(),
            rows.prefix_offsets_R.numpy(),
            rows.prefix_lengths_R.numpy(),
            np.float32(scale),
            np.float32(soft_cap),
            window,
            _array(out_RHD),
            _num_workers(q_RHD.numel() * longest),
        )
        return out_RHD

    def silu_mul(self, gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
        """See :class:`batchinfer.engine.ops.Ops`."""
        num_tokens, size = gate_up_T2F.shape
        out_TF = gate_up_T2F.new_empty(num_tokens, size // 2)
        _GATED[activation](_array(gate_up_T2F), _array(out_TF), _num_workers(gate_up_T2F.numel()))
        return out_TF


def _array(tensor: torch.Tensor) -> _Array:
    """The tensor's memory; bfloat16 as its bits."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: _Array = bits.numpy()
    return array


def _num_workers(num_elements: int) -> int:
    """Torch's number of threads, or one where there is little to do; numba's next kernel takes as many.

    Nothing between: OpenMP ends the threads that a smaller team does not need, and starts them anew.
    """
    num_workers = min(torch.get_num_threads(), _MAX_WORKERS) if num_elements >= _MIN_SHARED_ELEMENTS else 1
    numba.set_num_threads(num_workers)
    return num_workers
