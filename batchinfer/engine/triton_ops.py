"""The decoder's functions (``ops.py``) through Triton kernels: what runs on a GPU.

Importing this module needs triton; without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``).
Nothing here waits for the device, and launch grids depend on shapes and on the host's numbers alone, never on what
the index tensors hold. So a captured graph stays right when their contents change: ``max_length`` only balances the
work; groups may be empty at the end, and ``rows_M`` longer than what they use.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from batchinfer.engine import kernels_attention, kernels_elementwise
from batchinfer.engine.kernel_shapes import MAX_SPLITS, DeviceLimits, num_tiles, power_of_two
from batchinfer.engine.step_tensors import ChunkTensors, DecodeTensors, PrefixGroups

_LOG2_E = math.log2(math.e)
#: Up to so many chunks or groups are looked through by one and the same compiled kernel.
_FEW = 64
#: A relocation parks its KV here, some layers at a time.
_COPY_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TritonOps:
    """An :class:`~batchinfer.engine.ops.Ops` for tensors of one device.

    ``has_flash`` says that torch's own flash attention runs there, which prefills faster than ours where it can do
    what is asked.
    """

    limits: DeviceLimits
    has_flash: bool

    @classmethod
    def of(cls, device: torch.device) -> "TritonOps":
        """The ops for a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        # torch's type stubs do not know the first; without it (AMD) the plain limit is the limit.
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
        return cls(
            limits=DeviceLimits(properties.multi_processor_count, shared_bytes),
            has_flash=torch.version.hip is None and properties.major >= 8,
        )

    def add_rms_norm(
        self,
        residual_TE: torch.Tensor,
        delta_TE: torch.Tensor | None,
        weight_E: torch.Tensor,
        eps: float,
        unit_offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Ops`. The residual is overwritten where there is a delta."""
        _check_contiguous(residual_TE, residual_TE if delta_TE is None else delta_TE)
        num_tokens, num_dims = residual_TE.shape
        normed_TE = torch.empty_like(residual_TE)
        if num_tokens:
            padded = power_of_two(num_dims)
            kernels_elementwise.add_rms_norm_kernel[(num_tokens,)](
                residual_TE,
                residual_TE if delta_TE is None else delta_TE,
                weight_E,
                residual_TE,
                normed_TE,
                eps,
                E=num_dims,
                EP=padded,
                UNIT_OFFSET=unit_offset,
                HAS_DELTA=delta_TE is not None,
                num_warps=8 if padded >= 4096 else 4,
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
        """See :class:`Ops`."""
        _check_contiguous(qkv_TX, cos_PD2, sin_PD2)
        num_tokens = qkv_TX.shape[0]
        num_kv_heads, head_dim = keys_NKD.shape[1:]
        half = cos_PD2.shape[1] if rotary else head_dim // 2
        q_THD = qkv_TX.new_empty(num_tokens, num_heads, head_dim)
        if num_tokens:
            heads = 8
            kernels_elementwise.rope_kernel[(num_tokens, num_tiles(num_heads + 2 * num_kv_heads, heads))](
                qkv_TX,
                cos_PD2,
                sin_PD2,
                positions_T,
                places_T,
                q_THD,
                keys_NKD,
                values_NKD,
                qkv_TX if q_norm_D is None else q_norm_D,
                qkv_TX if k_norm_D is None else k_norm_D,
                eps,
                PLACE_STRIDE=_place_stride(keys_NKD, values_NKD),
                H=num_heads,
                K=num_kv_heads,
                D=head_dim,
                HALF=half,
                HALFP=power_of_two(half),
                RESTP=power_of_two(max(1, head_dim - 2 * half)),
                HEADS=heads,
                ROTARY=rotary,
                HAS_NORM=q_norm_D is not None,
                num_warps=4,
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
        """See :class:`Ops`. ``rows.max_length`` and the groups' maxima choose how work is cut, never what is right."""
        _check_contiguous(q_RHD)
        num_rows, num_heads, head_dim = q_RHD.shape
        num_kv_heads = keys_NKD.shape[1]
        out_RHD = torch.empty_like(q_RHD)
        if num_rows == 0:
            return out_RHD
        # Kernels take a tensor where they need none, of the type they would get: one compiled kernel for both.
        prefix_out = prefix_lse = split_out = split_lse = q_RHD.new_empty(0, dtype=torch.float32)
        if rows.groups is not None:
            prefix_out, prefix_lse = self._attend_prefixes(
                q_RHD, keys_NKD, values_NKD, rows, rows.groups, scale, soft_cap, window
            )
        keys_per_split = self.limits.keys_per_split(num_rows, num_kv_heads, rows.max_length)
        num_splits = num_tiles(rows.max_length, keys_per_split)
        if num_splits > 1:
            split_out = q_RHD.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
            split_lse = q_RHD.new_empty(num_rows, num_heads, num_splits, dtype=torch.float32)
        group = num_heads // num_kv_heads
        tile = self.limits.decode_tile(num_rows, group, head_dim, q_RHD.element_size())
        kernels_attention.decode_kernel[(num_rows, num_kv_heads, num_splits)](
            q_RHD,
            keys_NKD,
            values_NKD,
            out_RHD,
            rows.offsets_R,
            rows.lengths_R,
            rows.prefix_lengths_R,
            prefix_out,
            prefix_lse,
            split_out,
            split_lse,
            scale * _LOG2_E,
            keys_per_split,
            0 if rows.groups is None else prefix_lse.shape[2],
            PLACE_STRIDE=_place_stride(keys_NKD, values_NKD),
            H=num_heads,
            G=group,
            GP=tile.num_queries,
            D=head_dim,
            DP=power_of_two(head_dim),
            BN=tile.num_keys,
            WINDOW=window,
            SOFT_CAP=soft_cap,
            HAS_PREFIX=rows.groups is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if num_splits > 1:
            kernels_attention.merge_kernel[(num_rows, num_heads)](
                split_out,
                split_lse,
                out_RHD,
                rows.lengths_R,
                keys_per_split,
                num_splits,
                H=num_heads,
                D=head_dim,
                DP=power_of_two(head_dim),
                SP=MAX_SPLITS,
                WINDOW=window,
                num_warps=4,
            )
        return out_RHD

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
        """See :class:`Ops`."""
        _check_contiguous(q_THD)
        num_tokens, num_heads, head_dim = q_THD.shape
        if chunks.max_prefix_length + chunks.max_length <= window:
            window = 0
        plain = chunks.max_prefix_length == 0 and soft_cap == 0 and window == 0
        if plain and self.has_flash and q_THD.dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= 256:
            return _flash(q_THD, keys_NKD, values_NKD, chunks, scale)
        out_THD = torch.empty_like(q_THD)
        if num_tokens == 0:
            return out_THD
        num_chunks = len(chunks.chunks)
        tile = self.limits.tile(128 if num_tokens >= 96 * num_chunks else 64, head_dim, q_THD.element_size())
        kernels_attention.prefill_kernel[(num_tokens // tile.num_queries + num_chunks, num_heads)](
            q_THD,
            keys_NKD,
            values_NKD,
            out_THD,
            chunks.cu_queries_C1,
            chunks.offsets_C,
            chunks.lengths_C,
            chunks.prefix_offsets_C,
            chunks.prefix_lengths_C,
            scale * _LOG2_E,
            num_chunks,
            PLACE_STRIDE=_place_stride(keys_NKD, values_NKD),
            H=num_heads,
            G=num_heads // keys_NKD.shape[1],
            D=head_dim,
            DP=power_of_two(head_dim),
            CP=max(_FEW, power_of_two(num_chunks)),
            BM=tile.num_queries,
            BN=tile.num_keys,
            WINDOW=window,
            SOFT_CAP=soft_cap,
            HAS_PREFIX=chunks.max_prefix_length > 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out_THD

    def silu_mul(self, gate_up_T2F: torch.Tensor, activation: str) -> torch.Tensor:
        """See :class:`Ops`. Raises KeyError for an activation it does not know."""
        _check_contiguous(gate_up_T2F)
        num_tokens, num_dims = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        out_TF = gate_up_T2F.new_empty(num_tokens, num_dims)
        if num_tokens:
            tile = min(2048, power_of_two(num_dims))
            kernels_elementwise.gated_kernel[(num_tokens, num_tiles(num_dims, tile))](
                gate_up_T2F,
                out_TF,
                F=num_dims,
                BF=tile,
                GELU={"silu": False, "gelu_tanh": True}[activation],
                num_warps=8 if tile == 2048 else 4,
            )
        return out_TF

    def copy(
        self,
        keys_LNKD: torch.Tensor,
        values_LNKD: torch.Tensor,
        sources_M: torch.Tensor,
        targets_M: torch.Tensor,
    ) -> None:
        """See :class:`Ops`. Takes up to 64 MiB of scratch memory, or one layer's share of what moves."""
        num_layers, _, num_kv_heads, head_dim = keys_LNKD.shape
        num_places = sources_M.shape[0]
        if num_places == 0:
            return
        width = num_kv_heads * head_dim
        place_stride = _place_stride(keys_LNKD[0], values_LNKD[0])
        layer_bytes = 2 * num_places * width * keys_LNKD.element_size()
        num_parked = min(num_layers, max(1, _COPY_SCRATCH_BYTES // layer_bytes))
        parked = keys_LNKD.new_empty(2 * num_parked * num_places * width)
        for first in range(0, num_layers, num_parked):
            keys, values = keys_LNKD[first : first + num_parked], values_LNKD[first : first + num_parked]
            for kernel, places_M in (
                (kernels_elementwise.gather_kernel, sources_M),
                (kernels_elementwise.scatter_kernel, targets_M),
            ):
                kernel[(num_places, keys.shape[0])](
                    keys,
                    values,
                    parked,
                    places_M,
                    keys_LNKD.stride(0),
                    PLACE_STRIDE=place_stride,
                    W=width,
                    WP=power_of_two(width),
                    num_warps=4,
                )

    def _attend_prefixes(
        self,
        q_RHD: torch.Tensor,
        keys_NKD: torch.Tensor,
        values_NKD: torch.Tensor,
        rows: DecodeTensors,
        groups: PrefixGroups,
        scale: float,
        soft_cap: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [R, H, P, D] and lse [R, H, P] of the rows' prefixes; what belongs to other rows is left unset."""
        num_rows, num_heads, head_dim = q_RHD.shape
        num_kv_heads = keys_NKD.shape[1]
        group = num_heads // num_kv_heads
        padded_group = power_of_two(group)
        most_queries = power_of_two(groups.max_rows) * padded_group
        tile = self.limits.tile(most_queries, head_dim, q_RHD.element_size(), at_least=padded_group)
        num_row_tiles = groups.rows_M.shape[0] // (tile.num_queries // padded_group) + groups.num_groups
        num_splits = self.limits.num_prefix_splits(num_row_tiles * num_kv_heads, groups.max_length)
        prefix_out = q_RHD.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32)
        prefix_lse = q_RHD.new_empty(num_rows, num_heads, num_splits, dtype=torch.float32)
        kernels_attention.shared_prefix_kernel[(num_row_tiles, num_kv_heads, num_splits)](
            q_RHD,
            keys_NKD,
            values_NKD,
            prefix_out,
            prefix_lse,
            rows.lengths_R,
            groups.rows_M,
            groups.starts_G1,
            groups.offsets_G,
            groups.lengths_G,
            scale * _LOG2_E,
            groups.num_groups,
            PLACE_STRIDE=_place_stride(keys_NKD, values_NKD),
            H=num_heads,
            G=group,
            GP=padded_group,
            D=head_dim,
            DP=power_of_two(head_dim),
            NP=max(_FEW, power_of_two(groups.num_groups)),
            BM=tile.num_queries,
            BN=tile.num_keys,
            WINDOW=window,
            SOFT_CAP=soft_cap,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return prefix_out, prefix_lse


def _flash(
    q_THD: torch.Tensor, keys_NKD: torch.Tensor, values_NKD: torch.Tensor, chunks: ChunkTensors, scale: float
) -> torch.Tensor:
    """torch's own flash attention over extents: sequence c's keys begin at ``cum_seq_k[c]``, ``seqused_k[c]`` of them.

    Its causal mask aligns the newest query with the newest key, as chunks that continue a sequence need.
    """
    out_THD: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q_THD,
        keys_NKD,
        values_NKD,
        chunks.cu_queries_C1,
        functional.pad(chunks.offsets_C, (0, 1)),
        chunks.max_queries,
        chunks.max_length,
        0.0,
        True,
        False,
        scale=scale,
        seqused_k=chunks.lengths_C,
    )[0]
    return out_THD


def _check_contiguous(*tensors: torch.Tensor) -> None:
    """Kernels take addresses, not strides: of a view with gaps they would read the wrong elements."""
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernels take contiguous tensors only"


def _place_stride(keys_NKD: torch.Tensor, values_NKD: torch.Tensor) -> int:
    """Elements from one place to the next; the heads of a place lie together."""
    assert keys_NKD.stride() == values_NKD.stride(), "keys and values must be laid out alike"
    assert keys_NKD.stride()[1:] == (keys_NKD.shape[2], 1), "a place's heads must be contiguous"
    return keys_NKD.stride(0)
