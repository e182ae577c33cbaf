"""The Triton kernels compiled and run: the interpreter's checks at real sizes, and what only a device can show."""

import importlib.util

import pytest
import torch

from tests.unit.engine.kernel_checks import (
    Bench,
    Heads,
    Row,
    arena,
    attention_twin,
    check_copy,
    check_decode,
    check_far_places,
    check_gated,
    check_norm,
    check_prefill,
    check_rope,
    decode_rows,
)

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from batchinfer.engine.triton_ops import TritonOps  # noqa: E402

DEVICE = torch.device("cuda")
OPS = TritonOps.of(DEVICE)
#: Ours alone, without torch's flash attention.
OWN = TritonOps(OPS.limits, has_flash=False)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EXAONE = Heads(32, 8, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [EXAONE, Heads(32, 8, 80), Heads(9, 3, 64), Heads(40, 8, 96), Heads(16, 8, 256)])
def test_decode(heads: Heads, dtype: torch.dtype) -> None:
    ragged = [Row(1 + 37 * index % 600, (None, 0, 1)[index % 3]) for index in range(200)]
    check_decode(Bench(OPS, DEVICE, dtype), heads, ragged, prefixes=[513, 40])
    check_decode(Bench(OPS, DEVICE, dtype), heads, [Row(5000), Row(3, 0), Row(700, 0)], prefixes=[3000], num_padding=5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_window_and_soft_cap(dtype: torch.dtype) -> None:
    rows = [Row(3000), Row(100, 0), Row(900, 0), Row(5)]
    check_decode(Bench(OPS, DEVICE, dtype), Heads(16, 8, 256, soft_cap=50.0, window=1024), rows, prefixes=[700])


@pytest.mark.parametrize("ops", [OPS, OWN], ids=["flash", "own"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [EXAONE, Heads(32, 8, 80), Heads(16, 8, 256)])
def test_prefill(heads: Heads, dtype: torch.dtype, ops: TritonOps) -> None:
    rows = [Row(300, num_queries=300), Row(1, num_queries=1), Row(900, num_queries=129), Row(64, num_queries=64)]
    check_prefill(Bench(ops, DEVICE, dtype), heads, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [EXAONE, Heads(16, 8, 256, soft_cap=50.0, window=100)])
def test_prefill_behind_prefixes(heads: Heads, dtype: torch.dtype) -> None:
    rows = [Row(300, 0, 300), Row(5, 1, 5), Row(200, 0, 30), Row(64, num_queries=64)]
    check_prefill(Bench(OPS, DEVICE, dtype), heads, rows, prefixes=[513, 40])


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(dtype: torch.dtype) -> None:
    bench = Bench(OPS, DEVICE, dtype)
    for num_dims in (576, 2560, 4096):
        for unit_offset in (0.0, 1.0):
            check_norm(bench, 33, num_dims, unit_offset, with_delta=True)
            check_norm(bench, 33, num_dims, unit_offset, with_delta=False)
    for activation in ("silu", "gelu_tanh"):
        check_gated(bench, 17, 14336, activation)
        check_gated(bench, 17, 1537, activation)
    for with_norm in (False, True):
        check_rope(bench, EXAONE, 33, 128, with_norm=with_norm)
        check_rope(bench, Heads(32, 8, 80), 33, 80, with_norm=with_norm)
        check_rope(bench, Heads(32, 32, 96), 33, 72, with_norm=with_norm)
        check_rope(bench, EXAONE, 33, 128, rotary=False, with_norm=with_norm)
    check_copy(bench, 5, EXAONE, [1, 2, 3, 30, 9], [2, 3, 1, 9, 0])


def test_places_beyond_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of device memory")
    check_far_places(Bench(OPS, DEVICE, torch.bfloat16))


def test_a_captured_decode_is_right_for_rows_of_other_lengths() -> None:
    """What the launch takes from the host is frozen at capture; rows then grow past ``max_length`` and move."""
    bench = Bench(OPS, DEVICE, torch.bfloat16)
    prefixes = [700]
    rows = [Row(10, 0), Row(2500), Row(90), Row(1, 0)]
    where = arena(bench, EXAONE, prefixes, rows)
    q = bench.normal(len(rows), EXAONE.num_heads, EXAONE.dim)
    live = decode_rows(bench, where, prefixes, rows)
    captured = decode_rows(bench, where, prefixes, [Row(1, row.prefix) for row in rows])

    def attend() -> torch.Tensor:
        return OPS.decode_attention(q, where.keys, where.values, captured, EXAONE.scale, 0.0, 0)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    captured.lengths_R.copy_(live.lengths_R)
    graph.replay()
    bench.close(out, attention_twin(q, where, EXAONE, prefixes, rows))


def test_other_sizes_of_a_batch_compile_nothing_again() -> None:
    """Row counts, lengths and addresses change every step; a compilation in the middle of a job would stall it."""
    from triton import knobs

    bench = Bench(OPS, DEVICE, torch.bfloat16)
    compiled: list[object] = []

    def run(num_rows: int, num_own: int) -> None:
        rows = [Row(num_own + index, 0) for index in range(num_rows)]
        check_decode(bench, EXAONE, rows, prefixes=[num_own])
        check_prefill(bench, EXAONE, [Row(num_own, 0, num_own)] * 2, prefixes=[16 * num_rows])

    run(3, 17)
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **hook: compiled.append(hook["repr"])
    try:
        run(4, 32)
        run(3, 50)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled
