"""The kernels for CPUs against their twins: float32 and bfloat16, odd shapes, on one thread and on several."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.engine.kernel_checks import (
    Bench,
    Heads,
    Row,
    check_decode,
    check_gated,
    check_norm,
    check_prefill,
    check_rope,
)

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed (pip install -c constraints.txt numba)", allow_module_level=True)

import numba

from batchinfer.engine import cpu_ops
from batchinfer.engine.build import device_ops
from batchinfer.engine.cpu_ops import CpuOps
from batchinfer.engine.step_plan import DecodeRow, StepPlan
from batchinfer.engine.step_tensors import build
from batchinfer.engine.torch_ops import TorchOps

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
REPOSITORY = Path(__file__).parents[3]


def bench(dtype: torch.dtype = torch.float32, seed: int = 0) -> Bench:
    return Bench(CpuOps(), CPU, dtype, seed)


@pytest.fixture(autouse=True)
def share_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to do, all threads do it."""
    monkeypatch.setattr(cpu_ops, "_MIN_SHARED_ELEMENTS", 1)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> int:
    """The folder's own fixture puts torch's number back."""
    torch.set_num_threads(request.param)
    return int(request.param)


def test_threads_share_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "_MIN_SHARED_ELEMENTS", 1000)
    torch.set_num_threads(2)
    CpuOps().silu_mul(torch.ones(4, 200), "silu")
    assert numba.get_num_threads() == 1
    CpuOps().silu_mul(torch.ones(5, 200), "silu")
    assert numba.get_num_threads() == min(2, cpu_ops._MAX_WORKERS)


def test_a_cpu_gets_them_for_what_they_can_read() -> None:
    assert isinstance(device_ops(CPU, torch.bfloat16), CpuOps)
    assert isinstance(device_ops(CPU, torch.float32), CpuOps)
    assert type(device_ops(CPU, torch.float16)) is TorchOps


def test_without_numba_it_is_plain_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "batchinfer.engine.cpu_ops")
    assert type(device_ops(CPU, torch.float32)) is TorchOps
    assert "plain torch" in caplog.text
    assert "numba" in caplog.text


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128])
def test_decode_at_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    check_decode(bench(dtype), Heads(dim=dim), [Row(1), Row(17), Row(130), Row(4), Row(7)])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3), (5, 1), (14, 2), (32, 1)])
def test_decode_at_every_group_size(num_heads: int, num_kv_heads: int) -> None:
    check_decode(bench(), Heads(num_heads, num_kv_heads), [Row(33, 0), Row(5)], prefixes=[40])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_threads_share_the_heads_of_one_row(num_kv_heads: int) -> None:
    check_decode(bench(), Heads(2 * num_kv_heads, num_kv_heads), [Row(70, 0)], prefixes=[9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_decode_in_a_sliding_window(window: int, dtype: torch.dtype) -> None:
    """Windows that end inside the own keys, inside the prefix, and before both."""
    rows = [Row(3, 0), Row(30, 0), Row(90), Row(41, 0)]
    check_decode(bench(dtype), Heads(window=window), rows, prefixes=[66])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_with_a_soft_cap(dtype: torch.dtype) -> None:
    check_decode(bench(dtype), Heads(soft_cap=2.0), [Row(300, 0), Row(8), Row(2, 0)], prefixes=[33])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype: torch.dtype) -> None:
    rows = [Row(5, 0, 5), Row(40, 1, 30), Row(6, num_queries=6), Row(70, 0, 70)]
    check_prefill(bench(dtype), Heads(num_heads=4, num_kv_heads=2), rows, prefixes=[65, 3])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("unit_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, unit_offset: float, with_delta: bool) -> None:
    check_norm(bench(dtype), 3, 80, unit_offset, with_delta)
    check_norm(bench(dtype), 1, 64, unit_offset, with_delta)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dims"), [(64, 64), (80, 80), (96, 72), (128, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_writes_queries_keys_and_values(dtype: torch.dtype, dim: int, rotary_dims: int, with_norm: bool) -> None:
    check_rope(bench(dtype), Heads(9, 3, dim), num_tokens=4, rotary_dims=rotary_dims, with_norm=with_norm)


@pytest.mark.parametrize("with_norm", [True, False])
def test_layers_without_rotation_write_the_same_places(with_norm: bool) -> None:
    check_rope(bench(), Heads(4, 4, 80), num_tokens=3, rotary_dims=80, rotary=False, with_norm=with_norm)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(dtype: torch.dtype, activation: str) -> None:
    check_gated(bench(dtype), 3, 100, activation)
    check_gated(bench(dtype), 1, 2049, activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_any_size_stay_finite(activation: str) -> None:
    gates = torch.tensor([-1e38, -1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4])
    both = torch.cat((gates, torch.ones(len(gates))))[None]
    twin = TorchOps().silu_mul(both, activation)
    torch.testing.assert_close(CpuOps().silu_mul(both, activation), twin, atol=1e-30, rtol=1e-5)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(KeyError, match="relu"):
        CpuOps().silu_mul(torch.zeros(1, 4), "relu")


def test_nothing_to_do_is_nothing() -> None:
    assert CpuOps().silu_mul(torch.empty(0, 8), "silu").shape == (0, 4)
    assert CpuOps().add_rms_norm(torch.empty(0, 8), None, torch.ones(8), 1e-5, 0.0)[1].shape == (0, 8)


def test_every_bfloat16_is_read_and_written_as_torch_does() -> None:
    """All 65,536: residual + 0 goes through both conversions; NaN stays NaN and infinity infinite."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(256, 256)
    out, _ = CpuOps().add_rms_norm(bits.clone(), torch.zeros_like(bits), torch.ones(256).bfloat16(), 1e-5, 0.0)
    torch.testing.assert_close(out, bits + torch.zeros_like(bits), rtol=0, atol=0, equal_nan=True)


def test_sums_round_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 512, generator=generator).bfloat16()
    # A tie at every exponent: one and a half, two and a half units of the last place.
    left[0, :2], right[0, :2] = 1.0, torch.tensor([0.01171875, 0.01953125])
    out, _ = CpuOps().add_rms_norm(left.clone(), right, torch.ones(512).bfloat16(), 1e-5, 0.0)
    assert torch.equal(out, left + right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nans_is_alone_with_them(dtype: torch.dtype) -> None:
    """Its neighbours in the arena and in the batch read nothing of it."""
    where = torch.randn(2, 12, 2, 64).to(dtype)
    where[:, 5:8] = float("nan")
    q_RHD = torch.randn(3, 4, 64).to(dtype)
    plan = StepPlan((), (DecodeRow(0, 4, 0), DecodeRow(1, 2, 5), DecodeRow(2, 3, 8)), ())
    rows = build(plan, lambda _, start, stop: [0] * (stop - start), CPU).decode
    assert rows is not None
    out = CpuOps().decode_attention(q_RHD, *where, rows, 0.125, 0.0, 0)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


def test_torch_keeps_its_number_of_threads() -> None:
    """Numba sets OpenMP's number when it starts, which is torch's too: in a process that has used neither."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from batchinfer.engine.cpu_ops import CpuOps\n"
        "CpuOps().silu_mul(torch.ones(4, 8), 'silu')\n"
        "print(torch.get_num_threads())"
    )
    assert run_python(code, {}) == "1"


def test_where_no_folder_takes_its_machine_code_it_compiles_without_one() -> None:
    """Installed read-only, with no home: each process compiles for itself."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from batchinfer.engine import kernels_cpu\n"
        "print(kernels_cpu._can_cache())"
    )
    assert run_python(code, {}) == "False"


def run_python(code: str, environment: dict[str, str]) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.strip()


PREFIXES = st.lists(st.integers(1, 140), min_size=1, max_size=3)
SHAPES = st.sampled_from([Heads(2, 1, 64), Heads(6, 2, 64), Heads(3, 3, 80), Heads(4, 1, 24)])
WINDOWS = st.sampled_from([0, 0, 0, 1, 17, 90])


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.data(), PREFIXES, SHAPES, WINDOWS, st.sampled_from([0.0, 0.0, 3.0]), st.sampled_from(DTYPES))
def test_any_decode_batch(
    data: st.DataObject, prefixes: list[int], heads: Heads, window: int, soft_cap: float, dtype: torch.dtype
) -> None:
    owner = st.none() | st.integers(0, len(prefixes) - 1)
    rows = data.draw(st.lists(st.builds(Row, st.integers(1, 300), owner), min_size=1, max_size=5))
    heads = Heads(heads.num_heads, heads.num_kv_heads, heads.dim, soft_cap, window)
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    check_decode(bench(dtype, seed=len(rows)), heads, rows, prefixes)
