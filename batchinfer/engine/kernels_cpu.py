"""The steps between the matrix products on a CPU, compiled by numba: each reads its inputs once and writes once.

Arithmetic is float32; where transformers' modules round to the model's dtype on the way, so do these. bfloat16 comes
as its bits, uint16, because numpy has no such type: ``_wide`` reads a number of either kind, ``_like`` writes one.

Every kernel shares its rows among ``num_workers`` threads of OpenMP, in turns, so that long and short rows mix. Where
torch has been imported before, numba's OpenMP layer finds the library that torch has loaded, hence torch's own threads:
no two pools wait for one core. Numba must have been told so many threads, too.

Machine code is kept beside this file or in the user's cache folder (NUMBA_CACHE_DIR names another one). Numba looks at
this file alone to see whether it is still right: what a kernel calls must be here.

Shapes: T tokens, R decode rows, E hidden size, F inner size, H query heads, K key/value heads, D head dimension,
G = H / K, N places, P positions, C places that a row sees.
"""
# Kernels are numba's language, not Python: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg, var-annotated, attr-defined"

from functools import partial

import numpy as np
from llvmlite import ir
from numba import config, njit, prange, types
from numba.extending import intrinsic, overload

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def _can_cache() -> bool:
    """Whether there is a folder for machine code that this process may write to."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


#: What a compiler may not do by itself: sum in another order (into vector lanes) and fuse a product into a sum.
#: NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_compiled = partial(njit, nogil=True, fastmath=_FAST, error_model="numpy", cache=_can_cache())
_part, _kernel = _compiled(), _compiled(parallel=True)

_ZERO, _ONE = np.float32(0), np.float32(1)
#: Of the exponential of numbers below it float32 has no normal number.
_LEAST_EXPONENT = np.float32(-87.0)


@intrinsic
def _float_of_bits(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _wide(x):
    """A stored number as float32."""


@overload(_wide, jit_options={"fastmath": _FAST})
def _wide_of(x):
    if isinstance(x, types.Integer):
        return lambda x: _float_of_bits(np.uint32(x) << np.uint32(16))
    return lambda x: x


def _like(value, stored):
    """float32 as ``stored`` is stored: rounded to the nearest bfloat16, ties to even, or as it is."""


@overload(_like, jit_options={"fastmath": _FAST})
def _like_of(value, stored):
    if isinstance(stored, types.Integer):
        return _rounded
    return lambda value, stored: value


def _rounded(value, stored):
    bits = _bits_of_float(value)
    # A NaN has bits to lose in the sum, all of them at worst: it becomes the NaN that has none to lose.
    bits = bits if value == value else np.uint32(0x7FC00000)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_part
def _exp(x):
    """e**x for x <= 0, to 2 units in the last place (Cephes' expf); written out because the library's is a call.

    0 where float32 has no normal number for it.
    """
    below = x < _LEAST_EXPONENT
    x = max(x, _LEAST_EXPONENT)
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    x = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    power = _float_of_bits(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
    return _ZERO if below else (y * x * x + x + _ONE) * power


@_part
def _tanh(x):
    e = _exp(np.float32(-2) * abs(x))
    y = (_ONE - e) / (_ONE + e)
    return y if x >= _ZERO else -y


@_part
def _sigmoid(x):
    e = _exp(-abs(x))
    return _ONE / (_ONE + e) if x >= _ZERO else e / (_ONE + e)


@_kernel
def add_rms_norm(residual_TE, delta_TE, has_delta, weight_E, eps, unit_offset, normed_TE, num_workers):
    """``residual += delta`` if there is one, and its RMSNorm (``Ops.add_rms_norm``)."""
    num_tokens, size = residual_TE.shape
    for worker in prange(num_workers):
        for t in range(worker, num_tokens, num_workers):
            residual_E, normed_E = residual_TE[t], normed_TE[t]
            if has_delta:
                delta_E = delta_TE[t]
                for e in range(size):
                    residual_E[e] = _like(_wide(residual_E[e]) + _wide(delta_E[e]), residual_E[e])
            total = _ZERO
            for e in range(size):
                total += _wide(residual_E[e]) * _wide(residual_E[e])
            factor = _ONE / np.sqrt(total / np.float32(size) + eps)
            if unit_offset:
                for e in range(size):
                    normed_E[e] = _like(
                        _wide(residual_E[e]) * factor * (_wide(weight_E[e]) + unit_offset), residual_E[e]
                    )
            else:
                for e in range(size):
                    rounded = _like(_wide(residual_E[e]) * factor, residual_E[e])
                    normed_E[e] = _like(_wide(rounded) * _wide(weight_E[e]), residual_E[e])


@_part
def _turn(head_D, has_norm, norm_D, eps, cos_D2, sin_D2, wide_D, out_D):
    """One query or key head: norm, rotate, write."""
    size, half = len(head_D), len(cos_D2)
    for d in range(size):
        wide_D[d] = _wide(head_D[d])
    if has_norm:
        total = _ZERO
        for d in range(size):
            total += wide_D[d] * wide_D[d]
        factor = _ONE / np.sqrt(total / np.float32(size) + eps)
        for d in range(size):
            rounded = _like(wide_D[d] * factor, head_D[d])
            wide_D[d] = _wide(_like(_wide(rounded) * _wide(norm_D[d]), head_D[d]))
    for d in range(half):
        out_D[d] = _like(wide_D[d] * cos_D2[d] - wide_D[half + d] * sin_D2[d], head_D[d])
    for d in range(half):
        out_D[half + d] = _like(wide_D[half + d] * cos_D2[d] + wide_D[d] * sin_D2[d], head_D[d])
    for d in range(2 * half, size):
        out_D[d] = _like(wide_D[d], head_D[d])


@_kernel
def rope_and_write(
    heads_TXD,
    cos_PD2,
    sin_PD2,
    positions_T,
    places_T,
    keys_NKD,
    values_NKD,
    has_norm,
    q_norm_D,
    k_norm_D,
    eps,
    q_THD,
    num_workers,
):
    """Queries and keys normed and rotated, keys and values in their places (``Ops.rope_and_write``).

    Nothing is rotated where the tables have no columns.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv = keys_NKD.shape[1]
    for worker in prange(num_workers):
        wide_D = np.empty(head_dim, np.float32)
        for t in range(worker, num_tokens, num_workers):
            cos_D2, sin_D2, place = cos_PD2[positions_T[t]], sin_PD2[positions_T[t]], places_T[t]
            for h in range(num_heads):
                _turn(heads_TXD[t, h], has_norm, q_norm_D, eps, cos_D2, sin_D2, wide_D, q_THD[t, h])
            for k in range(num_kv):
                key_D = heads_TXD[t, num_heads + k]
                _turn(key_D, has_norm, k_norm_D, eps, cos_D2, sin_D2, wide_D, keys_NKD[place, k])
                values_NKD[place, k] = heads_TXD[t, num_heads + num_kv + k]


@_kernel
def silu_mul(gate_up_T2F, out_TF, num_workers):
    """``silu(gate) * up``."""
    num_tokens, size = out_TF.shape
    for worker in prange(num_workers):
        for t in range(worker, num_tokens, num_workers):
            gate_F, up_F, out_F = gate_up_T2F[t, :size], gate_up_T2F[t, size:], out_TF[t]
            for f in range(size):
                gate = _wide(gate_F[f])
                out_F[f] = _like(_wide(_like(gate * _sigmoid(gate), gate_F[f])) * _wide(up_F[f]), gate_F[f])


@_kernel
def gelu_tanh_mul(gate_up_T2F, out_TF, num_workers):
    """``gelu(gate, approximate="tanh") * up``."""
    num_tokens, size = out_TF.shape
    for worker in prange(num_workers):
        for t in range(worker, num_tokens, num_workers):
            gate_F, up_F, out_F = gate_up_T2F[t, :size], gate_up_T2F[t, size:], out_TF[t]
            for f in range(size):
                gate = _wide(gate_F[f])
                inner = np.float32(0.7978845608) * (gate + np.float32(0.044715) * gate * gate * gate)
                gelu = np.float32(0.5) * gate * (_ONE + _tanh(inner))
                out_F[f] = _like(_wide(_like(gelu, gate_F[f])) * _wide(up_F[f]), gate_F[f])


@_part
def _widen_four(run_CKD, c, k, wide_4D):
    """One head of the places ``c .. c + 3`` as float32."""
    for i in range(4):
        one_D = run_CKD[c + i, k]
        for d in range(len(one_D)):
            wide_4D[i, d] = _wide(one_D[d])


@_part
def _score(q_HD, keys_CKD, first_head, stop_head, group, wide_4D, scores_HC):
    """Scores of one row's queries, in float32, over a run of places."""
    num, _, head_dim = keys_CKD.shape
    full = num // 4 * 4
    # Four keys at a time: each query is read once for them.
    for c in range(0, full, 4):
        for k in range(first_head, stop_head):
            _widen_four(keys_CKD, c, k, wide_4D)
            for h in range(k * group, (k + 1) * group):
                score_0, score_1, score_2, score_3 = _ZERO, _ZERO, _ZERO, _ZERO
                for d in range(head_dim):
                    q = q_HD[h, d]
                    score_0 += q * wide_4D[0, d]
                    score_1 += q * wide_4D[1, d]
                    score_2 += q * wide_4D[2, d]
                    score_3 += q * wide_4D[3, d]
                scores_HC[h, c] = score_0
                scores_HC[h, c + 1] = score_1
                scores_HC[h, c + 2] = score_2
                scores_HC[h, c + 3] = score_3
    for c in range(full, num):
        for k in range(first_head, stop_head):
            key_D = keys_CKD[c, k]
            for h in range(k * group, (k + 1) * group):
                score = _ZERO
                for d in range(head_dim):
                    score += q_HD[h, d] * _wide(key_D[d])
                scores_HC[h, c] = score


@_part
def _softmax(scores_C, soft_cap):
    """In place."""
    if soft_cap:
        for c in range(len(scores_C)):
            scores_C[c] = soft_cap * _tanh(scores_C[c] / soft_cap)
    highest = scores_C[0]
    for c in range(len(scores_C)):
        highest = max(highest, scores_C[c])
    total = _ZERO
    for c in range(len(scores_C)):
        scores_C[c] = _exp(scores_C[c] - highest)
        total += scores_C[c]
    factor = _ONE / total
    for c in range(len(scores_C)):
        scores_C[c] *= factor


@_part
def _mix(weights_HC, values_CKD, first_head, stop_head, group, wide_4D, sums_HD):
    """Add the values of a run of places to the heads' sums, weighted."""
    num, _, head_dim = values_CKD.shape
    full = num // 4 * 4
    for c in range(0, full, 4):
        for k in range(first_head, stop_head):
            _widen_four(values_CKD, c, k, wide_4D)
            for h in range(k * group, (k + 1) * group):
                weight_0, weight_1 = weights_HC[h, c], weights_HC[h, c + 1]
                weight_2, weight_3 = weights_HC[h, c + 2], weights_HC[h, c + 3]
                for d in range(head_dim):
                    sums_HD[h, d] += (
                        weight_0 * wide_4D[0, d]
                        + weight_1 * wide_4D[1, d]
                        + weight_2 * wide_4D[2, d]
                        + weight_3 * wide_4D[3, d]
                    )
    for c in range(full, num):
        for k in range(first_head, stop_head):
            value_D = values_CKD[c, k]
            for h in range(k * group, (k + 1) * group):
                weight = weights_HC[h, c]
                for d in range(head_dim):
                    sums_HD[h, d] += weight * _wide(value_D[d])


@_part
def _attend(q_HD, prefix_keys_CKD, prefix_values_CKD, own_keys_CKD, own_values_CKD, heads, soft_cap, scratch, out_HD):
    """Some heads of one row: scores over both runs of places, softmax, values."""
    (first_head, stop_head, group), (scores_HC, sums_HD, wide_4D) = heads, scratch
    num_prefix, num_own = len(prefix_keys_CKD), len(own_keys_CKD)
    _score(q_HD, prefix_keys_CKD, first_head, stop_head, group, wide_4D, scores_HC[:, :num_prefix])
    _score(q_HD, own_keys_CKD, first_head, stop_head, group, wide_4D, scores_HC[:, num_prefix:])
    for h in range(first_head * group, stop_head * group):
        _softmax(scores_HC[h, : num_prefix + num_own], soft_cap)
        sums_HD[h] = _ZERO
    _mix(scores_HC[:, :num_prefix], prefix_values_CKD, first_head, stop_head, group, wide_4D, sums_HD)
    _mix(scores_HC[:, num_prefix:], own_values_CKD, first_head, stop_head, group, wide_4D, sums_HD)
    for h in range(first_head * group, stop_head * group):
        for d in range(sums_HD.shape[1]):
            out_HD[h, d] = _like(sums_HD[h, d], out_HD[h, d])


@_kernel
def decode_attention(
    q_RHD,
    keys_NKD,
    values_NKD,
    offsets_R,
    lengths_R,
    prefix_offsets_R,
    prefix_lengths_R,
    scale,
    soft_cap,
    window,
    out_RHD,
    num_workers,
):
    """One query per row over its prefix, then its own places (``Ops.decode_attention``)."""
    num_rows, num_heads, head_dim = q_RHD.shape
    num_kv = keys_NKD.shape[1]
    group = num_heads // num_kv
    # Where there are fewer rows than workers, a row's heads are shared out, too.
    num_parts = num_kv if num_rows < num_workers else 1
    num_columns = (lengths_R + prefix_lengths_R).max()
    for worker in prange(num_workers):
        q_HD = np.empty((num_heads, head_dim), np.float32)
        scratch = (
            np.empty((num_heads, num_columns), np.float32),
            np.empty((num_heads, head_dim), np.float32),
            np.empty((4, head_dim), np.float32),
        )
        for part in range(worker, num_rows * num_parts, num_workers):
            r = part // num_parts
            first_head = part % num_parts
            stop_head = first_head + num_kv // num_parts
            for h in range(first_head * group, stop_head * group):
                for d in range(head_dim):
                    q_HD[h, d] = _wide(q_RHD[r, h, d]) * scale
            # Places that the window hides: of the prefix first, then of the row's own.
            num_prefix, num_own = np.int64(prefix_lengths_R[r]), np.int64(lengths_R[r])
            hidden = max(num_prefix + num_own - window, 0) if window else 0
            hidden_prefix = min(hidden, num_prefix)
            prefix = slice(prefix_offsets_R[r] + hidden_prefix, prefix_offsets_R[r] + num_prefix)
            own = slice(offsets_R[r] + hidden - hidden_prefix, offsets_R[r] + num_own)
            _attend(
                q_HD,
                keys_NKD[prefix],
                values_NKD[prefix],
                keys_NKD[own],
                values_NKD[own],
                (first_head, stop_head, group),
                soft_cap,
                scratch,
                out_RHD[r],
            )
