"""The six functions of ``Ops`` in plain torch: the twin of the kernels, and in their place where they cannot run."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from batchinfer.engine import attention
from batchinfer.engine.attention import ChunkLayout, DecodeLayout
from batchinfer.engine.step_tensors import ChunkTensors, DecodeTensors


class TorchOps:
    """``Ops`` on any device. Keeps what all layers of a step share: its attention layouts and its angles."""

    def __init__(self) -> None:
        self._turns: _Turns | None = None
        self._rows: DecodeTensors | None = None
        self._chunks: ChunkTensors | None = None
        self._row_layouts: dict[int, DecodeLayout] = {}
        self._chunk_layouts: dict[int, tuple[ChunkLayout, ...]] = {}

    def add_rms_norm(
        self,
        residual_TE: torch.Tensor,
        delta_TE: torch.Tensor | None,
        weight_E: torch.Tensor,
        eps: float,
        unit_offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`batchinfer.engine.ops.Ops`."""
        if delta_TE is not None:
            residual_TE.add_(delta_TE)
        return residual_TE, _rms_norm(residual_TE, weight_E, eps, unit_offset)

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
        """See :class:`batchinfer.engine.ops.Ops`. Rotates in float32 and rounds once."""
        num_kv, head_dim = keys_NKD.shape[1:]
        heads = qkv_TX.view(qkv_TX.shape[0], num_heads + 2 * num_kv, head_dim)
        qk = heads[:, : num_heads + num_kv]
        if q_norm_D is not None and k_norm_D is not None:
            qk = torch.cat(
                (_rms_norm(qk[:, :num_heads], q_norm_D, eps, 0.0), _rms_norm(qk[:, num_heads:], k_norm_D, eps, 0.0)), 1
            )
        if rotary:
            qk = _rotate(qk, *self._turns_of(positions_T, cos_PD2, sin_PD2))
        keys_NKD.index_copy_(0, places_T, qk[:, num_heads:])
        values_NKD.index_copy_(0, places_T, heads[:, num_heads + num_kv :])
        return qk[:, :num_heads]

    def _turns_of(
        self, positions_T: torch.Tensor, cos_PD2: torch.Tensor, sin_PD2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turns = self._turns
        if turns is None or turns.positions_T is not positions_T or turns.cos_PD2 is not cos_PD2:
            cos_T1D2 = cos_PD2.index_select(0, positions_T)[:, None]
            sin_T1D2 = sin_PD2.index_select(0, positions_T)[:, None]
            turns = self._turns = _Turns(
                positions_T, cos_PD2, torch.cat((cos_T1D2, cos_T1D2), -1), torch.cat((-sin_T1D2, sin_T1D2), -1)
            )
        return turns.cos_T1D, turns.sin_T1D

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
        if rows is not self._rows:
            self._rows, self._row_layouts = rows, {}
        if window not in self._row_layouts:
            self._row_layouts[window] = attention.decode_layout(rows, keys_NKD, window)
        return attention.decode_attention(q_RHD, keys_NKD, values_NKD, self._row_layouts[window], scale, soft_cap)

    def prefill_attention(
        self,
        q_THD: torch.Tensor,
        keys_NKD: torch.Tensor,
        values_NKD: torch.Tensor,
        chunks: ChunkTensors,
        scale: float,
        soft_cap: float,
        window: int,
    ) -> torch.Tensor:
        """See :class:`batchinfer.engine.ops.Ops`."""
        if chunks is not self._chunks:
            self._chunks, self._chunk_layouts = chunks, {}
        if window not in self._chunk_layouts:
            num_groups = q_THD.shape[1] // keys_NKD.shape[1]
            self._chunk_layouts[window] = attention.prefill_layout(chunks, num_groups, window, q_THD)
        return attention.prefill_attention(q_THD, keys_NKD, values_NKD, self._chunk_layouts[window], scale, soft_cap)

    def silu_mul(self, gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
        """See :class:`batchinfer.engine.ops.Ops`."""
        gate_TF, up_TF = gate_up_T2F.chunk(2, -1)
        if activation == "gelu_tanh":
            return functional.gelu(gate_TF, approximate="tanh").mul_(up_TF)
        return functional.silu(gate_TF).mul_(up_TF)

    def copy(
        self,
        keys_LNKD: torch.Tensor,
        values_LNKD: torch.Tensor,
        sources_M: torch.Tensor,
        targets_M: torch.Tensor,
    ) -> None:
        """See :class:`batchinfer.engine.ops.Ops`. Takes a layer's worth of extra memory at a time."""
        for arena_LNKD in (keys_LNKD, values_LNKD):
            for layer_NKD in arena_LNKD:
                layer_NKD.index_copy_(0, targets_M, layer_NKD.index_select(0, sources_M))


def _rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, unit_offset: float) -> torch.Tensor:
    wide = x_TE.float()
    wide = wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if unit_offset:
        return wide.mul_(weight_E.float() + unit_offset).to(x_TE.dtype)
    return wide.to(x_TE.dtype).mul_(weight_E)


@dataclass(frozen=True, slots=True)
class _Turns:
    """Cosines and signed sines of a step's tokens, for both halves of a head, and what they were taken from."""

    positions_T: torch.Tensor
    cos_PD2: torch.Tensor
    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor


def _rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    num_columns = cos_T1D.shape[-1]
    wide = x_THD[..., :num_columns].float()
    left, right = wide.chunk(2, -1)
    turned = torch.addcmul(wide * cos_T1D, torch.cat((right, left), -1), sin_T1D).to(x_THD.dtype)
    return turned if num_columns == x_THD.shape[-1] else torch.cat((turned, x_THD[..., num_columns:]), -1)
