"""What the decoder asks of a device besides matrix products: six functions, in three editions.

``TorchOps`` is plain torch, the reference everywhere; ``TritonOps`` is for GPUs, ``CpuOps`` for CPUs. Tensor
suffixes: T tokens of a step, R decode rows, N places of the KV arena, L layers, H query heads, K key/value heads, D
head dimension, E hidden size, F inner size of the MLP, X = (H + 2 K) D, P positions, M places moved.
"""

from typing import Protocol

import torch

from batchinfer.engine.step_tensors import ChunkTensors, DecodeTensors


class Ops(Protocol):
    """Every function may be called in any order; none keeps a reference to what it was given but as said."""

    def add_rms_norm(
        self,
        residual_TE: torch.Tensor,
        delta_TE: torch.Tensor | None,
        weight_E: torch.Tensor,
        eps: float,
        unit_offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``residual + delta`` (the residual alone for None) and its RMSNorm, both in the residual's dtype.

        The sum is rounded to that dtype before the norm, which is taken in float32. With ``unit_offset`` 0 the
        normed value is rounded and then multiplied by the weight (LlamaRMSNorm); otherwise it is multiplied by
        ``unit_offset + weight`` in float32 and rounded once (Gemma2RMSNorm). May overwrite ``residual_TE`` where
        there is a delta; without one the residual is returned as it is.
        """

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
        """Split the fused projection, norm and rotate queries and keys, write keys and values to their places.

        Rows of ``qkv_TX`` are H query heads, K key heads, K value heads, each of D. The norms (RMSNorm over D as
        above, unit offset 0, Qwen 3 and EXAONE 4) come before the rotation. The tables are float32 and hold
        ``D' / 2`` columns; rotate-half pairs column i with ``i + D' / 2`` and columns from ``D'`` on pass as they
        are (Phi's partial rotary). Without ``rotary`` nothing is rotated. Returns the queries, [T, H, D].
        """

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
        """One query per row over the row's prefix places, then its own; [R, H, D].

        Scores are ``q k * scale``, then ``soft_cap * tanh(score / soft_cap)`` unless the cap is 0. A ``window`` of
        W lets a query at position p see positions ``p - W + 1 .. p``; 0 lets it see all up to p.
        """

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
        """As :meth:`decode_attention`, for the queries of all chunks, one chunk after the other; causal; [T, H, D]."""

    def silu_mul(self, gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
        """``activation(gate) * up`` with gate the first F columns; "silu" or "gelu_tanh"; [T, F]."""

    def copy(
        self,
        keys_LNKD: torch.Tensor,
        values_LNKD: torch.Tensor,
        sources_M: torch.Tensor,
        targets_M: torch.Tensor,
    ) -> None:
        """Copy keys and values of places in every layer. A target may be another's source: all are read first."""
