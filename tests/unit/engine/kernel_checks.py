"""Every kernel of ``TritonOps`` against a plain float64 twin: the same checks on the interpreter and on a GPU.

A ``Bench`` says where: device, dtype, and the ops under test. Arenas are NaN wherever a kernel has no business, so
that a wrong place shows; outputs are compared by ``|out - twin| / |twin|``.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchinfer.engine.ops import Ops
from batchinfer.engine.step_plan import DecodeRow, PrefillChunk, StepPlan
from batchinfer.engine.step_tensors import ChunkTensors, DecodeTensors, build

#: What rounding leaves of one kernel. bfloat16 is for a GPU: the interpreter cannot multiply it.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

#: Shared memory that one program may have, by compute capability.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}


@dataclass(frozen=True)
class Bench:
    """Where and with what the checks run; ``seed`` makes every check's numbers."""

    ops: Ops
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def normal(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def close(self, out: torch.Tensor, twin: torch.Tensor) -> None:
        assert out.shape == twin.shape
        assert out.dtype == self.dtype
        distance = (out.double() - twin).norm() / twin.norm().clamp(min=1e-30)
        assert distance < TOLERANCE[self.dtype], f"{distance:.1e}"


@dataclass(frozen=True)
class Heads:
    """A model's attention shape and its options."""

    num_heads: int = 8
    num_kv_heads: int = 2
    dim: int = 64
    soft_cap: float = 0.0
    window: int = 0

    @property
    def scale(self) -> float:
        return 1.3 / math.sqrt(self.dim)


@dataclass(frozen=True)
class Row:
    """A decode row (``num_queries`` 1) or a prefill chunk: the newest queries of ``num_own`` own tokens."""

    num_own: int
    prefix: int | None = None
    num_queries: int = 1


@dataclass(frozen=True)
class Arena:
    """Keys and values with every prefix and row somewhere in it, in scrambled order and with gaps."""

    keys: torch.Tensor
    values: torch.Tensor
    prefix_offsets: tuple[int, ...]
    row_offsets: tuple[int, ...]


def arena(bench: Bench, heads: Heads, prefixes: Sequence[int], rows: Sequence[Row]) -> Arena:
    sizes = [*prefixes, *(row.num_own for row in rows)]
    generator = torch.Generator().manual_seed(bench.seed)
    offsets, end = [0] * len(sizes), 3
    for index in torch.randperm(len(sizes), generator=generator).tolist():
        offsets[index] = end
        end += sizes[index] + int(torch.randint(0, 5, (), generator=generator))
    shape = (2, end + 3, heads.num_kv_heads, heads.dim)
    filled = bench.normal(*shape)
    tensors = torch.full_like(filled, float("nan"))
    for offset, size in zip(offsets, sizes, strict=True):
        tensors[:, offset : offset + size] = filled[:, offset : offset + size]
    return Arena(tensors[0], tensors[1], tuple(offsets[: len(prefixes)]), tuple(offsets[len(prefixes) :]))


def attention_twin(
    q: torch.Tensor, where: Arena, heads: Heads, prefixes: Sequence[int], rows: Sequence[Row]
) -> torch.Tensor:
    """Softmax of each query by itself, in float64."""
    outs = []
    first = 0
    group = heads.num_heads // heads.num_kv_heads
    for row, offset in zip(rows, where.row_offsets, strict=True):
        places = list(range(offset, offset + row.num_own))
        num_prefix = 0
        if row.prefix is not None:
            num_prefix = prefixes[row.prefix]
            start = where.prefix_offsets[row.prefix]
            places = [*range(start, start + num_prefix), *places]
        keys = where.keys[places].double().repeat_interleave(group, 1)
        values = where.values[places].double().repeat_interleave(group, 1)
        for query in range(row.num_queries):
            position = num_prefix + row.num_own - row.num_queries + query
            low = max(0, position - heads.window + 1) if heads.window else 0
            score = torch.einsum("hd,nhd->hn", q[first].double(), keys[low : position + 1]) * heads.scale
            if heads.soft_cap:
                score = heads.soft_cap * torch.tanh(score / heads.soft_cap)
            outs.append(torch.einsum("hn,nhd->hd", score.softmax(-1), values[low : position + 1]))
            first += 1
    return torch.stack(outs)


def decode_rows(bench: Bench, where: Arena, prefixes: Sequence[int], rows: Sequence[Row]) -> DecodeTensors:
    plan = StepPlan(
        copies=(),
        decode=tuple(
            DecodeRow(
                sequence=index,
                position=row.num_own - 1 + (0 if row.prefix is None else prefixes[row.prefix]),
                offset=offset,
                prefix_offset=0 if row.prefix is None else where.prefix_offsets[row.prefix],
                prefix_length=0 if row.prefix is None else prefixes[row.prefix],
            )
            for index, (row, offset) in enumerate(zip(rows, where.row_offsets, strict=True))
        ),
        prefill=(),
    )
    tensors = build(plan, lambda _, start, stop: [0] * (stop - start), bench.device).decode
    assert tensors is not None
    return tensors


def prefill_chunks(bench: Bench, where: Arena, prefixes: Sequence[int], rows: Sequence[Row]) -> ChunkTensors:
    chunks = []
    for index, (row, offset) in enumerate(zip(rows, where.row_offsets, strict=True)):
        num_prefix = 0 if row.prefix is None else prefixes[row.prefix]
        stop = num_prefix + row.num_own
        prefix_offset = 0 if row.prefix is None else where.prefix_offsets[row.prefix]
        chunks.append(PrefillChunk(index, stop - row.num_queries, stop, offset, True, prefix_offset, num_prefix))
    plan = StepPlan(copies=(), decode=(), prefill=tuple(chunks))
    tensors = build(plan, lambda _, start, stop: [0] * (stop - start), bench.device).chunks
    assert tensors is not None
    return tensors


def check_decode(
    bench: Bench,
    heads: Heads,
    rows: Sequence[Row],
    prefixes: Sequence[int] = (),
    num_padding: int = 0,
    max_length: int | None = None,
) -> None:
    """``num_padding`` rows without a token and as many empty groups follow, as a graph's bucket has them.

    ``max_length`` replaces the host's number, as when a captured graph is replayed for longer rows.
    """
    where = arena(bench, heads, prefixes, rows)
    tensors = decode_rows(bench, where, prefixes, rows)
    q = bench.normal(len(rows) + num_padding, heads.num_heads, heads.dim)
    if num_padding:
        tensors = _padded(tensors, num_padding)
    if max_length is not None:
        tensors = dataclasses.replace(tensors, max_length=max_length)
    out = bench.ops.decode_attention(q, where.keys, where.values, tensors, heads.scale, heads.soft_cap, heads.window)
    bench.close(out[: len(rows)], attention_twin(q, where, heads, prefixes, rows))
    assert (out[len(rows) :] == 0).all()


def _padded(tensors: DecodeTensors, num_padding: int) -> DecodeTensors:
    def widened(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((num_padding,), fill)])

    groups = tensors.groups
    if groups is not None:
        groups = dataclasses.replace(
            groups,
            rows_M=widened(groups.rows_M, 0),
            starts_G1=widened(groups.starts_G1, int(groups.starts_G1[-1])),
            offsets_G=widened(groups.offsets_G, 0),
            lengths_G=widened(groups.lengths_G, 0),
        )
    return dataclasses.replace(
        tensors,
        offsets_R=widened(tensors.offsets_R, 0),
        lengths_R=widened(tensors.lengths_R, 0),
        prefix_offsets_R=widened(tensors.prefix_offsets_R, 0),
        prefix_lengths_R=widened(tensors.prefix_lengths_R, 0),
        groups=groups,
    )


def check_prefill(bench: Bench, heads: Heads, rows: Sequence[Row], prefixes: Sequence[int] = ()) -> None:
    where = arena(bench, heads, prefixes, rows)
    q = bench.normal(sum(row.num_queries for row in rows), heads.num_heads, heads.dim)
    tensors = prefill_chunks(bench, where, prefixes, rows)
    out = bench.ops.prefill_attention(q, where.keys, where.values, tensors, heads.scale, heads.soft_cap, heads.window)
    bench.close(out, attention_twin(q, where, heads, prefixes, rows))


def norm_twin(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: float, dtype: torch.dtype
) -> torch.Tensor:
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return normed * (weight.double() + unit_offset)
    return normed.to(dtype).double() * weight.double()


def check_norm(bench: Bench, num_tokens: int, num_dims: int, unit_offset: float, with_delta: bool) -> None:
    residual, weight = bench.normal(num_tokens, num_dims), bench.normal(num_dims)
    delta = bench.normal(num_tokens + 1, num_dims)[1:] if with_delta else None
    total = residual if delta is None else (residual.float() + delta.float()).to(bench.dtype)
    twin = norm_twin(total, weight, 1e-5, unit_offset, bench.dtype)
    out, normed = bench.ops.add_rms_norm(residual.clone(), delta, weight, 1e-5, unit_offset)
    bench.close(out, total.double())
    bench.close(normed, twin)


def check_rope(
    bench: Bench, heads: Heads, num_tokens: int, rotary_dims: int, rotary: bool = True, with_norm: bool = False
) -> None:
    num_places, num_kv = 2 * num_tokens + 3, heads.num_kv_heads
    qkv = bench.normal(num_tokens, (heads.num_heads + 2 * num_kv) * heads.dim)
    angles = torch.rand(50, rotary_dims // 2, generator=torch.Generator().manual_seed(bench.seed)) * 7
    cos, sin = angles.cos().to(bench.device), angles.sin().to(bench.device)
    generator = torch.Generator().manual_seed(bench.seed)
    positions = torch.randint(0, 50, (num_tokens,), generator=generator).to(bench.device)
    places = torch.randperm(num_places, generator=generator)[:num_tokens].to(bench.device)
    cache = torch.full((2, num_places, num_kv, heads.dim), 7.0, device=bench.device, dtype=bench.dtype)
    q_norm, k_norm = (bench.normal(heads.dim), bench.normal(heads.dim + 1)[1:]) if with_norm else (None, None)
    q = bench.ops.rope_and_write(
        qkv, cos, sin, positions, places, cache[0], cache[1], heads.num_heads, q_norm, k_norm, 1e-6, rotary
    )

    def turned(x: torch.Tensor) -> torch.Tensor:
        if not rotary:
            return x
        half = rotary_dims // 2
        left, right, rest = x[..., :half], x[..., half:rotary_dims], x[..., rotary_dims:]
        c, s = cos[positions][:, None].double(), sin[positions][:, None].double()
        return torch.cat([left * c - right * s, right * c + left * s, rest], -1)

    parts = qkv.view(num_tokens, -1, heads.dim).double().split([heads.num_heads, num_kv, num_kv], 1)
    q_twin, k_twin = (
        part if weight is None else norm_twin(part, weight, 1e-6, 0.0, bench.dtype).to(bench.dtype).double()
        for part, weight in ((parts[0], q_norm), (parts[1], k_norm))
    )
    bench.close(q, turned(q_twin))
    bench.close(cache[0][places], turned(k_twin))
    assert torch.equal(cache[1][places], parts[2].to(bench.dtype))
    untouched = torch.ones(num_places, dtype=torch.bool, device=bench.device)
    untouched[places] = False
    assert (cache[:, untouched] == 7.0).all()


def check_gated(bench: Bench, num_tokens: int, num_dims: int, activation: str) -> None:
    gate_up = bench.normal(num_tokens, 2 * num_dims) * 3
    gate, up = gate_up.double().split(num_dims, 1)
    twin = {
        "silu": torch.nn.functional.silu(gate),
        "gelu_tanh": torch.nn.functional.gelu(gate, approximate="tanh"),
    }[activation]
    bench.close(bench.ops.silu_mul(gate_up, activation), twin.to(bench.dtype).double() * up)


def check_copy(bench: Bench, num_layers: int, heads: Heads, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Bit for bit, in every layer, with sources that are targets too."""
    cache = bench.normal(2, num_layers, 40, heads.num_kv_heads, heads.dim)
    twin = cache.clone()
    twin[:, :, list(targets)] = cache[:, :, list(sources)]
    places = torch.tensor([list(sources), list(targets)], dtype=torch.int64, device=bench.device)
    bench.ops.copy(cache[0], cache[1], places[0], places[1])
    assert torch.equal(cache, twin)


def check_far_places(bench: Bench) -> None:
    """Places beyond 2**31 elements: written by rope, read by both attentions, copied back to the arena's beginning."""
    heads = Heads(num_heads=4, num_kv_heads=2, dim=128)
    far = 2**31 // (2 * 128) + 11
    cache = torch.empty(2, 1, far + 64, 2, 128, device=bench.device, dtype=bench.dtype)
    keys, values = cache[0, 0], cache[1, 0]
    rows = [Row(num_own=9, num_queries=9)]
    where = Arena(keys, values, (), (far,))
    qkv = bench.normal(9, 8 * 128)
    tables = torch.ones(9, 64, device=bench.device), torch.zeros(9, 64, device=bench.device)
    positions = torch.arange(9, device=bench.device)
    q = bench.ops.rope_and_write(
        qkv, *tables, positions, positions + far, keys, values, heads.num_heads, None, None, 1e-6, True
    )
    assert torch.equal(keys[far : far + 9].flatten(1), qkv[:, 4 * 128 : 6 * 128])
    twin = attention_twin(q, where, heads, (), rows)
    tensors = prefill_chunks(bench, where, (), rows)
    bench.close(bench.ops.prefill_attention(q, keys, values, tensors, heads.scale, 0.0, 0), twin)
    row = decode_rows(bench, where, (), [Row(num_own=9)])
    bench.close(bench.ops.decode_attention(q[8:], keys, values, row, heads.scale, 0.0, 0), twin[8:])
    bench.ops.copy(cache[0], cache[1], positions + far, positions)
    assert torch.equal(cache[:, 0, :9], cache[:, 0, far : far + 9])
