"""The lean decoder: one forward pass of a step over fused weights and a flat KV arena.

What a family does differently is in its ``DecoderConfig``; what a device does differently is in its ``Ops``.
The arithmetic is that of transformers' modeling files, norm for norm and cast for cast, except that queries and
keys are rotated in float32 and rounded once.
"""

import torch

from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.engine.decoder_weights import DecoderWeights, LayerWeights
from batchinfer.engine.kv_cache import KvCache
from batchinfer.engine.ops import Ops
from batchinfer.engine.rotary import rotary_tables
from batchinfer.engine.step_tensors import CopyTensors, StepTensors

__all__ = ["Decoder"]


class Decoder:
    """A model ready to run. Holds no state of sequences: that is in the KV cache and in the step."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, ops: Ops, max_positions: int) -> None:
        """``max_positions`` bounds the positions of every step: the longest sequence that may come."""
        self.config = config
        self._weights = weights
        self._ops = ops
        self._cos_PD2, self._sin_PD2 = rotary_tables(config.rotary, max_positions, weights.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @torch.inference_mode()
    def forward(self, step: StepTensors, kv: KvCache) -> torch.Tensor:
        """Logits after the step's sampling tokens, [S, vocabulary], in the model's dtype.

        Does the step's copies first, then writes keys and values of all its tokens to their places. Nothing waits
        for the device. May be repeated for a step without copies: it writes the same again.
        """
        if step.copies is not None:
            self.copy(step.copies, kv)
        residual_TE = self._weights.embedding_VE.index_select(0, step.tokens_T)
        if self.config.embedding_scale != 1.0:
            # Gemma rounds the factor to the model's dtype first.
            residual_TE.mul_(torch.tensor(self.config.embedding_scale, dtype=self.dtype).item())
        delta_TE: torch.Tensor | None = None
        last = len(self._weights.layers) - 1
        for index, layer in enumerate(self._weights.layers):
            residual_TE, x_TE = self._add_norm(residual_TE, delta_TE, layer.before_attention_E)
            out_TX = self._attention(index, layer, x_TE, step, kv)
            if index == last and step.logits_rows_S is not None:
                # From here on tokens do not look at each other: those that sample nothing are done.
                out_TX = out_TX.index_select(0, step.logits_rows_S)
                residual_TE = residual_TE.index_select(0, step.logits_rows_S)
            delta_TE = self._norm(layer.out(out_TX), layer.after_attention_E)
            residual_TE, x_TE = self._add_norm(residual_TE, delta_TE, layer.before_mlp_E)
            inner_TF = self._ops.silu_mul(layer.gate_up(x_TE), self.config.activation)
            delta_TE = self._norm(layer.down(inner_TF), layer.after_mlp_E)
        _, x_TE = self._add_norm(residual_TE, delta_TE, self._weights.final_norm_E)
        logits_SV = self._weights.head(x_TE)
        cap = self.config.logit_soft_cap
        return logits_SV.div_(cap).tanh_().mul_(cap) if cap else logits_SV

    def copy(self, copies: CopyTensors, kv: KvCache) -> None:
        """The step's copies, which come before anything else of it."""
        self._ops.copy(kv.keys_LNKD, kv.values_LNKD, copies.sources_M, copies.targets_M)

    def _attention(
        self, index: int, layer: LayerWeights, x_TE: torch.Tensor, step: StepTensors, kv: KvCache
    ) -> torch.Tensor:
        """Attention's output before its projection, [T, H D]."""
        config = self.config
        keys_NKD, values_NKD = kv.keys_LNKD[index], kv.values_LNKD[index]
        q_THD = self._ops.rope_and_write(
            layer.qkv(x_TE),
            self._cos_PD2,
            self._sin_PD2,
            step.positions_T,
            step.places_T,
            keys_NKD,
            values_NKD,
            config.num_heads,
            layer.q_norm_D,
            layer.k_norm_D,
            config.eps,
            config.rotates[index],
        )
        outs = []
        options = (config.score_scale, config.score_soft_cap, config.windows[index])
        if step.decode is not None:
            q_RHD = q_THD[: step.num_decode]
            outs.append(self._ops.decode_attention(q_RHD, keys_NKD, values_NKD, step.decode, *options))
        if step.chunks is not None:
            q_CHD = q_THD[step.num_decode :]
            outs.append(self._ops.prefill_attention(q_CHD, keys_NKD, values_NKD, step.chunks, *options))
        out_THD = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out_THD.reshape(x_TE.shape[0], config.num_heads * config.head_dim)

    def _add_norm(
        self, residual_TE: torch.Tensor, delta_TE: torch.Tensor | None, weight_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and its norm; where the family has no norm here, the sum is both."""
        if weight_E is None:
            total_TE = residual_TE if delta_TE is None else residual_TE + delta_TE
            return total_TE, total_TE
        config = self.config
        return self._ops.add_rms_norm(residual_TE, delta_TE, weight_E, config.eps, config.norm_unit_offset)

    def _norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor | None) -> torch.Tensor:
        return x_TE if weight_E is None else self._add_norm(x_TE, None, weight_E)[1]
