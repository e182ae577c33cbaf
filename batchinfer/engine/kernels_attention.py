"""Attention over extents in Triton: decode rows, prefixes that rows share, prefill chunks.

The arithmetic is FlashAttention's running softmax (Dao 2023, algorithm 1) in base 2: a query keeps the largest score
``m`` so far, the sum ``l`` of ``exp2(score - m)`` and the sum of values weighted by it. Parts of one query's keys may
be attended apart and joined afterwards: a part is its output and its ``lse``, ``m + log2(l)``, -inf for no keys.

Indices: a row's *own* keys are those of its extent, counted from 0 there; prefix keys are counted from the prefix's
start. A query sees the prefix whole and its own keys up to itself, or the last ``WINDOW`` of them all if WINDOW > 0.
``SOFT_CAP`` > 0 makes a score x into ``SOFT_CAP * tanh(x / SOFT_CAP)``. ``scale`` holds log2(e) already.
Scores, sums and outputs are float32; the dot products take the arena's dtype (float32 in full precision, not TF32).

Shapes: R decode rows, M of them in prefix groups, T query tokens, C chunks, H query heads, G of them on one KV head,
D head dim (DP its next power of two), S splits of a row's own keys, P splits of a prefix; inside a kernel M queries and
N keys of one tile. Places are int64: an arena may have more than 2**31 elements. Integer arguments and pointers into
packed index tensors are not specialised, or their values would make Triton compile again in the middle of a job.
"""
# Kernels are Triton's language, not Python: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _attend(q_MD, keys, values, place_N, live_N, seen_MN, m_M, l_M, acc_MD, scale, D, DP, SOFT_CAP):
    """Take one tile of keys into the running softmax: keys not ``live`` are not read, not ``seen`` weigh nothing."""
    d = tl.arange(0, DP)
    if D == DP:
        k_mask = live_N[None, :]
        v_mask = live_N[:, None]
    else:
        k_mask = live_N[None, :] & (d < D)[:, None]
        v_mask = live_N[:, None] & (d < D)[None, :]
    k_DN = tl.load(keys + place_N[None, :] + d[:, None], mask=k_mask, other=0.0)
    x_MN = tl.dot(q_MD, k_DN, input_precision="ieee") * scale
    if SOFT_CAP > 0:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1), and x is log2(e) times the score; right at both infinities.
        x_MN = SOFT_CAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(x_MN * (2.0 / SOFT_CAP)) + 1.0))
    x_MN = tl.where(seen_MN, x_MN, float("-inf"))
    larger_M = tl.maximum(m_M, tl.max(x_MN, 1))
    # A query that has seen no key yet: -inf minus -inf must not be asked for.
    base_M = tl.where(larger_M == float("-inf"), 0.0, larger_M)
    p_MN = tl.exp2(x_MN - base_M[:, None])
    shrink_M = tl.exp2(m_M - base_M)
    v_ND = tl.load(values + place_N[:, None] + d[None, :], mask=v_mask, other=0.0)
    acc_MD = acc_MD * shrink_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision="ieee")
    return larger_M, l_M * shrink_M + tl.sum(p_MN, 1), acc_MD


@triton.jit
def _num_splits(num_own, keys_per_split, most, WINDOW):
    """Splits that hold keys of a row: at least one, so that somebody writes a row without keys."""
    if WINDOW > 0:
        num_own = tl.minimum(num_own, WINDOW)
    return tl.maximum(tl.minimum(tl.cdiv(num_own, keys_per_split), most), 1)


@triton.jit(
    do_not_specialize=["keys_per_split", "num_prefix_splits"],
    do_not_specialize_on_alignment=["offsets_R", "lengths_R", "prefix_lengths_R"],
)
def decode_kernel(
    q_RHD,
    keys,
    values,
    out_RHD,
    offsets_R,
    lengths_R,
    prefix_lengths_R,
    prefix_out_RHPD,
    prefix_lse_RHP,
    split_out_RHSD,
    split_lse_RHS,
    scale,
    keys_per_split,
    num_prefix_splits,
    PLACE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """Own keys of one (row, KV head, split): grid (R, KV heads, S). ``lengths_R`` are own keys, the newest included.

    A row takes ``keys_per_split`` keys a split, the last split all the rest, so any length is right for any S. A row
    of one split is written to ``out_RHD`` at once; one of several leaves its parts to ``merge_kernel``. The parts of
    the row's prefix, if any, are where split 0 starts from. A row without any key gets zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_own = tl.load(lengths_R + row).to(tl.int32)
    num_splits = _num_splits(num_own, keys_per_split, tl.num_programs(2), WINDOW)
    if split >= num_splits:
        return
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    real_GD = (g < G)[:, None] & (d < D)[None, :]
    head = row * H + kv_head * G + g
    q_GD = tl.load(q_RHD + head[:, None] * D + d[None, :], mask=real_GD, other=0.0)
    m_G = tl.full([GP], float("-inf"), tl.float32)
    l_G = tl.zeros([GP], tl.float32)
    acc_GD = tl.zeros([GP, DP], tl.float32)

    if HAS_PREFIX:
        has_parts = (split == 0) & (tl.load(prefix_lengths_R + row) > 0)
        for part in range(tl.where(has_parts, num_prefix_splits, 0)):
            index = head * num_prefix_splits + part
            lse_G = tl.load(prefix_lse_RHP + index, mask=g < G, other=float("-inf"))
            full_GD = real_GD & (lse_G > float("-inf"))[:, None]
            part_GD = tl.load(prefix_out_RHPD + index[:, None] * D + d[None, :], mask=full_GD, other=0.0)
            larger_G = tl.maximum(m_G, lse_G)
            base_G = tl.where(larger_G == float("-inf"), 0.0, larger_G)
            shrink_G = tl.exp2(m_G - base_G)
            weight_G = tl.exp2(lse_G - base_G)
            acc_GD = acc_GD * shrink_G[:, None] + part_GD * weight_G[:, None]
            l_G = l_G * shrink_G + weight_G
            m_G = larger_G

    start = split * keys_per_split
    if WINDOW > 0:
        start += tl.maximum(num_own - WINDOW, 0)
    stop = tl.where(split == num_splits - 1, num_own, start + keys_per_split)
    offset = tl.load(offsets_R + row).to(tl.int64)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        live_N = j < stop
        place_N = (offset + j) * PLACE_STRIDE + kv_head * D
        m_G, l_G, acc_GD = _attend(
            q_GD, keys, values, place_N, live_N, live_N[None, :], m_G, l_G, acc_GD, scale, D, DP, SOFT_CAP
        )

    sum_G = tl.where(l_G > 0, l_G, 1.0)
    result_GD = acc_GD / sum_G[:, None]
    if num_splits == 1:
        tl.store(out_RHD + head[:, None] * D + d[None, :], result_GD.to(out_RHD.dtype.element_ty), mask=real_GD)
    else:
        index = head * tl.num_programs(2) + split
        tl.store(split_out_RHSD + index[:, None] * D + d[None, :], result_GD, mask=real_GD)
        lse_G = tl.where(l_G > 0, m_G + tl.log2(sum_G), float("-inf"))
        tl.store(split_lse_RHS + index, lse_G, mask=g < G)


@triton.jit(do_not_specialize=["keys_per_split", "most_splits"], do_not_specialize_on_alignment=["lengths_R"])
def merge_kernel(
    split_out_RHSD,
    split_lse_RHS,
    out_RHD,
    lengths_R,
    keys_per_split,
    most_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Join the splits of one (row, query head): grid (R, H). Rows of one split have been written already."""
    row = tl.program_id(0).to(tl.int64)
    num_own = tl.load(lengths_R + row).to(tl.int32)
    num_splits = _num_splits(num_own, keys_per_split, most_splits, WINDOW)
    if num_splits == 1:
        return
    d = tl.arange(0, DP)
    s = tl.arange(0, SP)
    head = row * H + tl.program_id(1)
    index_S = head * most_splits + s
    lse_S = tl.load(split_lse_RHS + index_S, mask=s < num_splits, other=float("-inf"))
    # Every split of such a row holds a key, so the largest is finite.
    weight_S = tl.exp2(lse_S - tl.max(lse_S, 0))
    mask_SD = (s < num_splits)[:, None] & (d < D)[None, :]
    part_SD = tl.load(split_out_RHSD + index_S[:, None] * D + d[None, :], mask=mask_SD, other=0.0)
    result_D = tl.sum(part_SD * weight_S[:, None], 0) / tl.sum(weight_S, 0)
    tl.store(out_RHD + head * D + d, result_D.to(out_RHD.dtype.element_ty), mask=d < D)


@triton.jit(
    do_not_specialize=["num_groups"],
    do_not_specialize_on_alignment=["lengths_R", "rows_M", "bounds_G1", "offsets_G", "prefix_lengths_G"],
)
def shared_prefix_kernel(
    q_RHD,
    keys,
    values,
    prefix_out_RHPD,
    prefix_lse_RHP,
    lengths_R,
    rows_M,
    bounds_G1,
    offsets_G,
    prefix_lengths_G,
    scale,
    num_groups,
    PLACE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Prefix keys of BM // GP rows of one group on one KV head: grid (rows // (BM // GP) + groups, KV heads, P).

    Group i is the rows ``rows_M[bounds_G1[i] : bounds_G1[i + 1]]``; its queries go through the prefix as one tile, so
    that a prefix is read once for all of them. Its tiles begin at program ``bounds_G1[i] // (BM // GP) + i``, as the
    chunks' do in ``prefill_kernel``; empty groups at the end cost one idle program each. Writes an output and an lse
    per (row, head, split of the prefix); outputs of an lse of -inf and rows of no group are not written.
    """
    ROWS: tl.constexpr = BM // GP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    most_splits = tl.num_programs(2)
    i = tl.arange(0, NP)
    first_tile = tl.load(bounds_G1 + i, mask=i < num_groups, other=0) // ROWS + i
    group = tl.sum(((first_tile <= tile) & (i < num_groups)).to(tl.int32), 0) - 1
    begin = tl.load(bounds_G1 + group).to(tl.int32)
    num_rows = tl.load(bounds_G1 + group + 1).to(tl.int32) - begin
    first_row = (tile - begin // ROWS - group) * ROWS
    if first_row >= num_rows:
        return
    query = tl.arange(0, BM)
    g = query % GP
    member = first_row + query // GP
    real_M = (member < num_rows) & (g < G)
    row = tl.load(rows_M + begin + member, mask=real_M, other=0).to(tl.int64)
    d = tl.arange(0, DP)
    real_MD = real_M[:, None] & (d < D)[None, :]
    head = row * H + kv_head * G + g
    q_MD = tl.load(q_RHD + head[:, None] * D + d[None, :], mask=real_MD, other=0.0)
    m_M = tl.full([BM], float("-inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    acc_MD = tl.zeros([BM, DP], tl.float32)

    offset = tl.load(offsets_G + group).to(tl.int64)
    num_keys = tl.load(prefix_lengths_G + group).to(tl.int32)
    start = 0
    if WINDOW > 0:
        num_own_M = tl.load(lengths_R + row, mask=real_M, other=0).to(tl.int32)
        first_M = num_keys + num_own_M - WINDOW
        start = tl.minimum(tl.maximum(tl.min(tl.where(real_M, first_M, num_keys), 0), 0), num_keys)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys - start, BN), most_splits) * BN
    start += split * keys_per_split
    stop = tl.minimum(num_keys, start + keys_per_split)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        live_N = j < stop
        seen_MN = live_N[None, :]
        if WINDOW > 0:
            seen_MN = seen_MN & (j[None, :] >= first_M[:, None])
        place_N = (offset + j) * PLACE_STRIDE + kv_head * D
        m_M, l_M, acc_MD = _attend(
            q_MD, keys, values, place_N, live_N, seen_MN, m_M, l_M, acc_MD, scale, D, DP, SOFT_CAP
        )

    index = head * most_splits + split
    full_M = l_M > 0
    sum_M = tl.where(full_M, l_M, 1.0)
    tl.store(prefix_out_RHPD + index[:, None] * D + d[None, :], acc_MD / sum_M[:, None], mask=real_MD & full_M[:, None])
    tl.store(prefix_lse_RHP + index, tl.where(full_M, m_M + tl.log2(sum_M), float("-inf")), mask=real_M)


@triton.jit(
    do_not_specialize=["num_chunks"],
    do_not_specialize_on_alignment=["bounds_C1", "offsets_C", "lengths_C", "prefix_offsets_C", "prefix_lengths_C"],
)
def prefill_kernel(
    q_THD,
    keys,
    values,
    out_THD,
    bounds_C1,
    offsets_C,
    lengths_C,
    prefix_offsets_C,
    prefix_lengths_C,
    scale,
    num_chunks,
    PLACE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """Causal attention of one tile of a chunk's queries in one query head: grid (T // BM + C, H).

    Chunk c's queries are tokens ``bounds_C1[c] .. bounds_C1[c + 1] - 1`` and the newest of its ``lengths_C[c]`` own
    tokens. Its tiles begin at program ``bounds_C1[c] // BM + c``: every chunk has enough of them and at most one idles,
    so that no list of tiles need be made.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    c = tl.arange(0, CP)
    first_tile_C = tl.load(bounds_C1 + c, mask=c < num_chunks, other=0) // BM + c
    chunk = tl.sum(((first_tile_C <= tile) & (c < num_chunks)).to(tl.int32), 0) - 1
    begin = tl.load(bounds_C1 + chunk).to(tl.int64)
    num_queries = (tl.load(bounds_C1 + chunk + 1) - begin).to(tl.int32)
    first_query = ((tile - begin // BM - chunk) * BM).to(tl.int32)
    if first_query >= num_queries:
        return
    query = first_query + tl.arange(0, BM)
    real_M = query < num_queries
    d = tl.arange(0, DP)
    index_M = (begin + query) * H + head
    mask_MD = real_M[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_THD + index_M[:, None] * D + d[None, :], mask=mask_MD, other=0.0)
    m_M = tl.full([BM], float("-inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    acc_MD = tl.zeros([BM, DP], tl.float32)
    kv_offset = (head // G) * D
    #: Own index of the tile's first query, and of each.
    num_before = tl.load(lengths_C + chunk).to(tl.int32) - num_queries + first_query
    own_M = num_before + tl.arange(0, BM)

    if HAS_PREFIX:
        num_prefix = tl.load(prefix_lengths_C + chunk).to(tl.int32)
        offset = tl.load(prefix_offsets_C + chunk).to(tl.int64)
        start = 0
        if WINDOW > 0:
            start = tl.maximum(num_prefix + num_before + 1 - WINDOW, 0)
        for first in range(start, num_prefix, BN):
            j = first + tl.arange(0, BN)
            live_N = j < num_prefix
            seen_MN = live_N[None, :]
            if WINDOW > 0:
                seen_MN = seen_MN & (j[None, :] > num_prefix + own_M[:, None] - WINDOW)
            place_N = (offset + j) * PLACE_STRIDE + kv_offset
            m_M, l_M, acc_MD = _attend(
                q_MD, keys, values, place_N, live_N, seen_MN, m_M, l_M, acc_MD, scale, D, DP, SOFT_CAP
            )

    offset = tl.load(offsets_C + chunk).to(tl.int64)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(num_before + 1 - WINDOW, 0)
    stop = num_before + tl.minimum(BM, num_queries - first_query)
    for first in range(start, stop, BN):
        j = first + tl.arange(0, BN)
        seen_MN = j[None, :] <= own_M[:, None]
        if WINDOW > 0:
            seen_MN = seen_MN & (j[None, :] > own_M[:, None] - WINDOW)
        place_N = (offset + j) * PLACE_STRIDE + kv_offset
        m_M, l_M, acc_MD = _attend(
            q_MD, keys, values, place_N, j < stop, seen_MN, m_M, l_M, acc_MD, scale, D, DP, SOFT_CAP
        )

    sum_M = tl.where(l_M > 0, l_M, 1.0)
    result_MD = (acc_MD / sum_M[:, None]).to(out_THD.dtype.element_ty)
    tl.store(out_THD + index_M[:, None] * D + d[None, :], result_MD, mask=mask_MD)
