"""Attention over extents in plain torch: batched matrix products over gathered places.

Rows of similar length are gathered side by side and share three batched calls (scores, softmax, values), the G
query heads of a key/value head being G queries of one product, so that each key is read once for all of them. A
prefix is not gathered at all: the queries of all rows that share it meet the one copy in one product per key/value
head, and their scores over it and over their own places stand side by side in one softmax.

Rows are gathered to one length, beyond their ends with their last place again, which is masked.

Where everything lies is worked out once a step and holds for all layers with one window: a *layout*. Batches come
in few sizes (lengths rounded up, row counts from a list), because oneDNN compiles a kernel for each new shape.

Suffixes as in ``ops.py``; further n rows of a batch, G query heads per key/value head, Z = R K, B query rows of a
product, C its key columns.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.engine.step_tensors import ChunkTensors, DecodeTensors

#: Lengths of a batch are multiples of so many places.
_LENGTH_STEP = 32
#: Keys gathered at once, if more than one row is: they should stay in a core's own cache.
_MAX_BATCH_BYTES = 3 << 19
#: Rows of a batch of several.
_BATCH_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: What the calls of a batch cost beside its keys, in bytes of keys.
_BATCH_COST_BYTES = 1 << 18
#: Queries of one block of a chunk: keys after a block's end are not looked at by any of its queries. Twice as many
#: take 1.2 to 2.2 times as long from 256 tokens on: more of the scores are masked, and they outgrow a core's cache.
_BLOCK_QUERIES = 128
#: Blocks get smaller where contexts are long, but not below this.
_MIN_BLOCK_QUERIES = 16
#: Scores of one block and key/value head.
_MAX_BLOCK_SCORES = 1 << 20

_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows ``first .. stop - 1`` of the layout's order, gathered to one length.

    ``places_Z`` is what to gather of an arena seen as [N K, D]: per key/value head, per row, place after place. Masks
    are 0 where a query may look and minus infinity elsewhere; None where it may look everywhere.
    """

    first: int
    stop: int
    length: int
    places_Z: torch.Tensor
    own_mask_nC: torch.Tensor
    prefix_mask_nC: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Batches whose rows share the places ``prefix_start .. prefix_stop - 1``; none where the two are equal."""

    prefix_start: int
    prefix_stop: int
    batches: tuple[RowBatch, ...]


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """``into_Z`` takes queries [R K, G D] into the order of the batches, ``back_Z`` results out of it."""

    into_Z: torch.Tensor
    back_Z: torch.Tensor
    groups: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Queries ``first .. stop - 1`` of the chunks' tokens, which see positions ``begin .. end - 1`` of their context.

    ``mask_BC`` goes for the last columns; all before them are seen by every query.
    """

    first: int
    stop: int
    begin: int
    end: int
    mask_BC: torch.Tensor


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """One chunk: its context is ``prefix_places`` then ``own_places``, as slices of the arena."""

    prefix_places: slice
    own_places: slice
    blocks: tuple[Block, ...]


def batch_sizes(lengths: SequenceOf[int], num_shared: int, place_bytes: int) -> list[tuple[int, int]]:
    """Cut rows sorted longest first into batches: (rows, padded length) of each, in order.

    The cheapest cut, where a batch costs the keys of its places, padding included, ``_BATCH_COST_BYTES`` for its
    calls, and reading the ``num_shared`` places of the prefix. ``place_bytes`` are those of one place's keys. A batch
    of several rows has at most ``_MAX_BATCH_BYTES`` of its own.
    """
    padded = [-(-length // _LENGTH_STEP) * _LENGTH_STEP for length in lengths]
    num = len(padded)
    max_places = _MAX_BATCH_BYTES // place_bytes
    batch_cost = _BATCH_COST_BYTES // place_bytes + num_shared
    # From the last row backwards: the least cost of all rows from here on, and the batch that it begins with.
    costs = [0] * (num + 1)
    chosen = [1] * num
    for first in range(num - 1, -1, -1):
        length = padded[first]
        costs[first] = length + costs[first + 1]
        for num_rows in _BATCH_ROWS:
            stop = first + num_rows
            if stop > num or num_rows * length > max_places:
                break
            cost = num_rows * length + costs[stop]
            if cost < costs[first]:
                costs[first], chosen[first] = cost, num_rows
        costs[first] += batch_cost
    batches = []
    first = 0
    while first < num:
        batches.append((chosen[first], padded[first]))
        first += chosen[first]
    return batches


def decode_layout(rows: DecodeTensors, keys_NKD: torch.Tensor, window: int) -> DecodeLayout:
    """Where the decode rows' attention finds everything in arenas like ``keys_NKD``.

    Own places before the window's begin are left out, so long rows cost a window's work in windowed layers.
    """
    offsets, lengths, prefix_offsets, prefix_lengths = (
        column.cpu().numpy().astype(np.int64)
        for column in (rows.offsets_R, rows.lengths_R, rows.prefix_offsets_R, rows.prefix_lengths_R)
    )
    # Places hidden by the window: of the prefix first, then of the row's own.
    hidden = np.maximum(lengths + prefix_lengths - window, 0) if window else np.zeros_like(lengths)
    prefix_begins = np.minimum(hidden, prefix_lengths)
    own_begins = hidden - prefix_begins
    own_starts, own_lengths = offsets + own_begins, lengths - own_begins
    place_bytes = keys_NKD[0].nbytes
    # A prefix that no query sees any more is no prefix.
    prefixes = np.where(prefix_begins < prefix_lengths, prefix_offsets, -1)
    order = np.lexsort((-own_lengths, prefixes))
    groups = []
    first = 0
    for members in np.split(order, np.flatnonzero(np.diff(prefixes[order])) + 1):
        shared = bool(prefixes[members[0]] >= 0)
        begin = int(prefix_begins[members].min()) if shared else 0
        end = int(prefix_lengths[members[0]]) if shared else 0
        base = int(prefix_offsets[members[0]])
        batches = []
        for num_rows, length in batch_sizes(own_lengths[members].tolist(), end - begin, place_bytes):
            chosen = order[first : first + num_rows]
            prefix_mask = None
            if shared and prefix_begins[chosen].max() > begin:
                prefix_mask = _mask(np.arange(begin, end) < prefix_begins[chosen][:, None], keys_NKD)
            columns = np.arange(length)
            last = own_lengths[chosen][:, None] - 1
            places = own_starts[chosen][:, None] + np.minimum(columns, last)
            batches.append(
                RowBatch(
                    first=first,
                    stop=first + num_rows,
                    length=length,
                    places_Z=_of_all_heads(places, keys_NKD),
                    own_mask_nC=_mask(columns > last, keys_NKD),
                    prefix_mask_nC=prefix_mask,
                )
            )
            first += num_rows
        groups.append(RowGroup(base + begin, base + end, tuple(batches)))
    heads = np.arange(keys_NKD.shape[1])
    into = np.concatenate(
        [
            (order[batch.first : batch.stop] * len(heads) + heads[:, None]).ravel()
            for group in groups
            for batch in group.batches
        ]
    )
    return DecodeLayout(
        into_Z=torch.from_numpy(into).to(keys_NKD.device),
        back_Z=torch.from_numpy(np.argsort(into)).to(keys_NKD.device),
        groups=tuple(groups),
    )


def decode_attention(
    q_RHD: torch.Tensor,
    keys_NKD: torch.Tensor,
    values_NKD: torch.Tensor,
    layout: DecodeLayout,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """``Ops.decode_attention`` by a layout of the same rows."""
    num_rows, num_heads, head_dim = q_RHD.shape
    num_kv = keys_NKD.shape[1]
    group = num_heads // num_kv
    keys_XD, values_XD = keys_NKD.view(-1, head_dim), values_NKD.view(-1, head_dim)
    queries = q_RHD.reshape(num_rows * num_kv, group * head_dim).index_select(0, layout.into_Z)
    queries_ZGD = queries.view(num_rows * num_kv, group, head_dim)
    out_ZGD = torch.empty_like(queries_ZGD)
    for sharing in layout.groups:
        num_shared = sharing.prefix_stop - sharing.prefix_start
        shared_keys_KCD = keys_NKD[sharing.prefix_start : sharing.prefix_stop].transpose(0, 1)
        shared_values_KCD = values_NKD[sharing.prefix_start : sharing.prefix_stop].transpose(0, 1)
        for batch in sharing.batches:
            num, length = batch.stop - batch.first, batch.length
            here = slice(batch.first * num_kv, batch.stop * num_kv)
            q_ZGD, target_ZGD = queries_ZGD[here], out_ZGD[here]
            own_keys = keys_XD.index_select(0, batch.places_Z).view(num_kv * num, length, head_dim)
            own_values = values_XD.index_select(0, batch.places_Z).view(num_kv * num, length, head_dim)
            own = _scores(q_ZGD, own_keys, scale, soft_cap)
            own.view(num_kv, num, group, length).add_(batch.own_mask_nC[:, None])
            if not num_shared:
                torch.bmm(own.softmax(-1), own_values, out=target_ZGD)
                continue
            # Per key/value head the queries of all rows stand together: one product with the one copy of the prefix.
            q_KBD = q_ZGD.view(num_kv, num * group, head_dim)
            shared = _scores(q_KBD, shared_keys_KCD, scale, soft_cap)
            if batch.prefix_mask_nC is not None:
                shared.view(num_kv, num, group, num_shared).add_(batch.prefix_mask_nC[:, None])
            weights = torch.cat((shared, own.view(num_kv, num * group, length)), -1).softmax(-1)
            own_weights = weights[..., num_shared:].reshape(num_kv * num, group, length)
            torch.bmm(own_weights, own_values, out=target_ZGD)
            target_ZGD.view(num_kv, num * group, head_dim).baddbmm_(weights[..., :num_shared], shared_values_KCD)
    out = out_ZGD.view(num_rows * num_kv, group * head_dim).index_select(0, layout.back_Z)
    return out.view(num_rows, num_heads, head_dim)


def prefill_layout(chunks: ChunkTensors, num_groups: int, window: int, like: torch.Tensor) -> tuple[ChunkLayout, ...]:
    """Where the chunks' attention finds everything; ``num_groups`` query heads share a key/value head."""
    layouts = []
    first = 0
    for chunk in chunks.chunks:
        blocks = []
        start = chunk.start
        while start < chunk.stop:
            most = max(_MIN_BLOCK_QUERIES, min(_BLOCK_QUERIES, _MAX_BLOCK_SCORES // (num_groups * chunk.stop)))
            stop = min(start + most, chunk.stop)
            begin = max(0, start + 1 - window) if window else 0
            masked_from = begin if window else start
            positions, columns = np.arange(start, stop)[:, None], np.arange(masked_from, stop)
            unseen = columns > positions
            if window:
                unseen |= columns <= positions - window
            blocks.append(
                Block(
                    first=first + start - chunk.start,
                    stop=first + stop - chunk.start,
                    begin=begin,
                    end=stop,
                    mask_BC=_mask(unseen, like),
                )
            )
            start = stop
        first += chunk.num_tokens
        own = chunk.offset + chunk.stop - chunk.prefix_length
        layouts.append(
            ChunkLayout(
                prefix_places=slice(chunk.prefix_offset, chunk.prefix_offset + chunk.prefix_length),
                own_places=slice(chunk.offset, own),
                blocks=tuple(blocks),
            )
        )
    return tuple(layouts)


def prefill_attention(
    q_THD: torch.Tensor,
    keys_NKD: torch.Tensor,
    values_NKD: torch.Tensor,
    layouts: SequenceOf[ChunkLayout],
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """``Ops.prefill_attention`` by the layouts of the same chunks."""
    _, num_heads, head_dim = q_THD.shape
    num_kv = keys_NKD.shape[1]
    group = num_heads // num_kv
    out_THD = torch.empty_like(q_THD)
    for layout in layouts:
        keys_KCD = _context(keys_NKD, layout)
        values_KCD = _context(values_NKD, layout)
        for block in layout.blocks:
            num = block.stop - block.first
            q_KBD = q_THD[block.first : block.stop].view(num, num_kv, group, head_dim).transpose(0, 1)
            q_KBD = q_KBD.reshape(num_kv, num * group, head_dim)
            scores = _scores(q_KBD, keys_KCD[:, block.begin : block.end], scale, soft_cap)
            masked = scores.view(num_kv, num, group, -1)[..., -block.mask_BC.shape[1] :]
            masked.add_(block.mask_BC[:, None])
            out = torch.bmm(scores.softmax(-1), values_KCD[:, block.begin : block.end])
            out_THD[block.first : block.stop] = (
                out.view(num_kv, num, group, head_dim).transpose(0, 1).reshape(num, num_heads, head_dim)
            )
    return out_THD


def _scores(q_BGD: torch.Tensor, keys_BCD: torch.Tensor, scale: float, soft_cap: float) -> torch.Tensor:
    unused = q_BGD.new_empty(())
    alpha = scale / soft_cap if soft_cap else scale
    scores = torch.baddbmm(unused, q_BGD, keys_BCD.transpose(1, 2), beta=0, alpha=alpha)
    return scores.tanh_().mul_(soft_cap) if soft_cap else scores


def _context(arena_NKD: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """The places of a chunk's context, [K, places, D], copied: torch's product would copy a view once per block."""
    own_KCD = arena_NKD[layout.own_places].transpose(0, 1)
    if layout.prefix_places.start == layout.prefix_places.stop:
        return own_KCD.contiguous()
    return torch.cat((arena_NKD[layout.prefix_places].transpose(0, 1), own_KCD), 1)


def _of_all_heads(places_nC: _Ints, arena_NKD: torch.Tensor) -> torch.Tensor:
    """Rows of [N K, D] that hold these places, head after head."""
    num_heads = arena_NKD.shape[1]
    rows_KnC = places_nC * num_heads + np.arange(num_heads)[:, None, None]
    return torch.from_numpy(rows_KnC.ravel()).to(arena_NKD.device)


def _mask(unseen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(unseen.shape, dtype=like.dtype)
    mask.masked_fill_(torch.from_numpy(unseen), float("-inf"))
    return mask.to(like.device)
