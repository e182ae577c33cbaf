"""The small fused steps between the matrix products, in Triton: each reads its inputs once and writes its outputs once.

Arithmetic is float32; where transformers' modules round to the model's dtype on the way, so do these.
Shapes: T tokens, E hidden size, F intermediate size, H query heads, K KV heads, D head dim, L layers,
M places moved, W = K D elements of a place.
"""
# Kernels are Triton's language, not Python: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(
    residual_TE,
    delta_TE,
    weight_E,
    sum_TE,
    normed_TE,
    eps,
    E: tl.constexpr,
    EP: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """One token: ``sum = residual + delta`` and RMSNorm of it: grid (T,). Without delta ``sum_TE`` is not written.

    Llama rounds the normed value before the weight, Gemma (``UNIT_OFFSET`` 1) only after it.
    """
    e = tl.arange(0, EP)
    real = e < E
    index = tl.program_id(0).to(tl.int64) * E + e
    x = tl.load(residual_TE + index, mask=real, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_TE + index, mask=real, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + delta).to(sum_TE.dtype.element_ty)
        tl.store(sum_TE + index, x, mask=real)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / E + eps)
    weight = tl.load(weight_E + e, mask=real, other=0.0).to(tl.float32)
    # The branch is taken at compile time: not an expression of the kernel.
    if UNIT_OFFSET == 0:  # noqa: SIM108
        y = y.to(normed_TE.dtype.element_ty).to(tl.float32) * weight
    else:
        y = y * (weight + UNIT_OFFSET)
    tl.store(normed_TE + index, y.to(normed_TE.dtype.element_ty), mask=real)


@triton.jit
def _normed(y, weight, scale, dtype):
    """RMSNorm of a head's values, rounded before and after the weight as transformers does."""
    return ((y * scale[:, None]).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["positions_T", "places_T"])
def rope_kernel(
    qkv_TX,
    cos_P,
    sin_P,
    positions_T,
    places_T,
    q_THD,
    keys,
    values,
    q_norm_D,
    k_norm_D,
    eps,
    PLACE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALFP: tl.constexpr,
    RESTP: tl.constexpr,
    HEADS: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Some heads of one token: grid (T, tiles of HEADS of the H + 2 K heads).

    Splits the fused QKV, norms q and k per head, rotates their first ``2 * HALF`` dims (dim i with i + HALF), leaves
    the rest as it is, and writes q, and k and v to the token's place. Without ROTARY nothing is rotated. The tables
    ``cos_P`` and ``sin_P`` are float32 [positions, HALF].
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALFP)
    REST: tl.constexpr = D - 2 * HALF
    dtype = q_THD.dtype.element_ty
    half_mask = (h < H + 2 * K)[:, None] & (i < HALF)[None, :]
    source = qkv_TX + token * ((H + 2 * K) * D) + h[:, None] * D
    left = tl.load(source + i[None, :], mask=half_mask, other=0.0).to(tl.float32)
    right = tl.load(source + HALF + i[None, :], mask=half_mask, other=0.0).to(tl.float32)
    is_q = (h < H)[:, None]
    is_k = ((h >= H) & (h < H + K))[:, None]
    is_v = ((h >= H + K) & (h < H + 2 * K))[:, None]
    is_qk = is_q | is_k
    if REST > 0:
        r = 2 * HALF + tl.arange(0, RESTP)
        rest_mask = (h < H + 2 * K)[:, None] & (r < D)[None, :]
        rest = tl.load(source + r[None, :], mask=rest_mask, other=0.0).to(tl.float32)

    if HAS_NORM:
        square = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        if REST > 0:
            square += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / D + eps)
        dims = i[None, :]
        q_weight = tl.load(q_norm_D + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm_D + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        left = tl.where(is_qk, _normed(left, tl.where(is_q, q_weight, k_weight), scale, dtype), left)
        q_weight = tl.load(q_norm_D + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm_D + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        right = tl.where(is_qk, _normed(right, tl.where(is_q, q_weight, k_weight), scale, dtype), right)
        if REST > 0:
            dims = r[None, :]
            q_weight = tl.load(q_norm_D + dims, mask=dims < D, other=0.0).to(tl.float32)
            k_weight = tl.load(k_norm_D + dims, mask=dims < D, other=0.0).to(tl.float32)
            rest = tl.where(is_qk, _normed(rest, tl.where(is_q, q_weight, k_weight), scale, dtype), rest)

    if ROTARY:
        position = tl.load(positions_T + token).to(tl.int64)
        cos = tl.load(cos_P + position * HALF + i, mask=i < HALF, other=0.0)[None, :]
        sin = tl.load(sin_P + position * HALF + i, mask=i < HALF, other=0.0)[None, :]
        turned = left * cos - right * sin
        right = tl.where(is_qk, right * cos + left * sin, right)
        left = tl.where(is_qk, turned, left)

    place = tl.load(places_T + token).to(tl.int64) * PLACE_STRIDE
    to_q = q_THD + token * (H * D) + h[:, None] * D
    to_k = keys + place + (h[:, None] - H) * D
    to_v = values + place + (h[:, None] - H - K) * D
    left = left.to(dtype)
    right = right.to(dtype)
    tl.store(to_q + i[None, :], left, mask=half_mask & is_q)
    tl.store(to_k + i[None, :], left, mask=half_mask & is_k)
    tl.store(to_v + i[None, :], left, mask=half_mask & is_v)
    tl.store(to_q + HALF + i[None, :], right, mask=half_mask & is_q)
    tl.store(to_k + HALF + i[None, :], right, mask=half_mask & is_k)
    tl.store(to_v + HALF + i[None, :], right, mask=half_mask & is_v)
    if REST > 0:
        rest = rest.to(dtype)
        tl.store(to_q + r[None, :], rest, mask=rest_mask & is_q)
        tl.store(to_k + r[None, :], rest, mask=rest_mask & is_k)
        tl.store(to_v + r[None, :], rest, mask=rest_mask & is_v)


@triton.jit
def gated_kernel(gate_up_T2F, out_TF, F: tl.constexpr, BF: tl.constexpr, GELU: tl.constexpr):
    """``act(gate) * up`` of BF dims of one token, the activation rounded first: grid (T, tiles of F)."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    gate = tl.load(gate_up_T2F + token * (2 * F) + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_T2F + token * (2 * F) + F + f, mask=f < F, other=0.0).to(tl.float32)
    bend = gate
    if GELU:
        # 0.5 x (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x**3)
        bend = 2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    act = (gate / (1.0 + tl.exp(-bend))).to(out_TF.dtype.element_ty).to(tl.float32)
    tl.store(out_TF + token * F + f, (act * up).to(out_TF.dtype.element_ty), mask=f < F)


@triton.jit(do_not_specialize=["layer_stride"], do_not_specialize_on_alignment=["places_M"])
def gather_kernel(
    keys, values, parked_2LMW, places_M, layer_stride, PLACE_STRIDE: tl.constexpr, W: tl.constexpr, WP: tl.constexpr
):
    """KV of one place in one layer (W elements of keys, W of values) into a scratch tensor: grid (M, L)."""
    w = tl.arange(0, WP)
    layer = tl.program_id(1).to(tl.int64)
    source = layer * layer_stride + tl.load(places_M + tl.program_id(0)).to(tl.int64) * PLACE_STRIDE + w
    target = (layer * tl.num_programs(0) + tl.program_id(0)) * W + w
    half = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * W
    tl.store(parked_2LMW + target, tl.load(keys + source, mask=w < W), mask=w < W)
    tl.store(parked_2LMW + half + target, tl.load(values + source, mask=w < W), mask=w < W)


@triton.jit(do_not_specialize=["layer_stride"], do_not_specialize_on_alignment=["places_M"])
def scatter_kernel(
    keys, values, parked_2LMW, places_M, layer_stride, PLACE_STRIDE: tl.constexpr, W: tl.constexpr, WP: tl.constexpr
):
    """The way back of ``gather_kernel``: from the scratch tensor to the places."""
    w = tl.arange(0, WP)
    layer = tl.program_id(1).to(tl.int64)
    target = layer * layer_stride + tl.load(places_M + tl.program_id(0)).to(tl.int64) * PLACE_STRIDE + w
    source = (layer * tl.num_programs(0) + tl.program_id(0)) * W + w
    half = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * W
    tl.store(keys + target, tl.load(parked_2LMW + source, mask=w < W), mask=w < W)
    tl.store(values + target, tl.load(parked_2LMW + half + source, mask=w < W), mask=w < W)
