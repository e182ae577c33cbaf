"""Compile the kernels for a GPU that is not there and print what came out; run by test_kernels.py as a program.

The interpreter does not check Triton's types or a device's limits; the compiler does, and needs no device. A driver
that only knows the device's name is put in, and every launch becomes a compilation. Prints one JSON object: the
names and shared memory of the kernels compiled, and the names of those that only other sizes of a batch brought.
"""

import dataclasses
import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from batchinfer.engine.kernel_shapes import DeviceLimits
from batchinfer.engine.kernels_sampling import nucleus_thresholds
from batchinfer.engine.triton_ops import TritonOps
from tests.unit.engine.kernel_checks import SHARED_BYTES, Bench, Heads, Row, arena, decode_rows, prefill_chunks


class AbsentDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def run_all(bench: Bench, heads: Heads, num_rows: int, length: int, num_chunks: int) -> None:
    """Every kernel at the sizes of one step. Index tensors lie at other alignments for every ``num_chunks``."""
    ops, dtype = bench.ops, bench.dtype
    where = arena(bench, heads, [17], [Row(4, 0)] * num_chunks)
    few = decode_rows(bench, where, [17], [Row(4, 0)] * num_chunks)
    assert few.groups is not None

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1].repeat(num_rows)

    groups = dataclasses.replace(few.groups, max_rows=num_rows, max_length=length)
    rows = dataclasses.replace(
        few,
        offsets_R=repeated(few.offsets_R),
        lengths_R=repeated(few.lengths_R),
        prefix_offsets_R=repeated(few.prefix_offsets_R),
        prefix_lengths_R=repeated(few.prefix_lengths_R),
        groups=groups,
        max_length=length,
    )
    q = torch.zeros(num_rows, heads.num_heads, heads.dim, dtype=dtype)
    options = (heads.scale, heads.soft_cap, heads.window)
    ops.decode_attention(q, where.keys, where.values, rows, *options)
    chunks = prefill_chunks(bench, where, [17], [Row(4, 0, 4)] * num_chunks)
    ops.prefill_attention(q, where.keys, where.values, chunks, *options)

    x = torch.zeros(num_rows, 4096, dtype=dtype)
    ops.add_rms_norm(x, x, x[0], 1e-5, 0.0)
    ops.add_rms_norm(x, None, x[0], 1e-5, 1.0)
    ops.silu_mul(x, "silu")
    ops.silu_mul(x, "gelu_tanh")
    tables, positions = torch.zeros(9, heads.dim // 4), torch.arange(num_rows)
    qkv, weight = torch.zeros(num_rows, (heads.num_heads + 2 * heads.num_kv_heads) * heads.dim, dtype=dtype), x[0]
    for norm, rotary in ((None, True), (weight, True), (weight, False)):
        ops.rope_and_write(
            qkv,
            tables,
            tables,
            positions,
            positions,
            where.keys,
            where.values,
            heads.num_heads,
            norm,
            norm,
            1e-6,
            rotary,
        )
    ops.copy(where.keys[None], where.values[None], positions, positions)
    weights = torch.zeros(num_rows, 1000, dtype=torch.float64)
    nucleus_thresholds(weights, weights[:, 0], weights[:, 0] > 0, weights[:, 0])


def main(capability: int) -> None:
    driver.set_active(AbsentDevice(capability))
    compiled: dict[object, tuple[str, int]] = {}
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = (self.fn.__name__, kernel.metadata.shared)

    JITFunction.run = compile_only
    ops = TritonOps(DeviceLimits(100, SHARED_BYTES[capability]), has_flash=False)
    bench = Bench(ops, torch.device("cpu"), torch.bfloat16)
    full, capped = Heads(32, 8, 128), Heads(16, 8, 256, soft_cap=50.0, window=4096)
    run_all(bench, full, num_rows=300, length=3000, num_chunks=3)
    run_all(bench, capped, num_rows=40, length=100, num_chunks=3)
    first = dict(compiled)
    run_all(bench, full, num_rows=400, length=200, num_chunks=4)
    run_all(bench, capped, num_rows=33, length=2000, num_chunks=7)
    again = [name for key, (name, _) in compiled.items() if key not in first]
    print(json.dumps({"compiled": list(first.values()), "again": again}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
