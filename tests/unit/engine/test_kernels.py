"""The Triton kernels on the CPU, in Triton's interpreter: every kernel against its twin at odd shapes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.engine.kernel_checks import (
    SHARED_BYTES,
    Bench,
    Heads,
    Row,
    check_copy,
    check_decode,
    check_far_places,
    check_gated,
    check_norm,
    check_prefill,
    check_rope,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install -c constraints.txt triton)", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu/test_kernels_gpu.py runs these checks on it", allow_module_level=True)
# Triton decides when it is imported whether it interprets; where other tests come first, tests/conftest.py has set it.
os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import Exaone4Config, Gemma2Config, LlamaConfig, PreTrainedConfig

from batchinfer.engine import kernels_attention, kernels_elementwise, kernels_sampling, kv_cache
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import decoder_config
from batchinfer.engine.decoder_weights import random_weights
from batchinfer.engine.kernel_shapes import DeviceLimits
from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk, StepPlan
from batchinfer.engine.step_tensors import build
from batchinfer.engine.torch_ops import TorchOps
from batchinfer.engine.triton_ops import TritonOps

#: numpy's complaints about what IEEE arithmetic defines and the kernels rely on: exp of a large number is infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

FEW = TritonOps(DeviceLimits(num_multiprocessors=1, shared_bytes=100_000), has_flash=False)
#: So many multiprocessors that everything is split as far as it may.
MANY = TritonOps(DeviceLimits(num_multiprocessors=132, shared_bytes=30_000), has_flash=False)
HALF = torch.float16


def bench(ops: TritonOps = FEW, dtype: torch.dtype = torch.float32, seed: int = 0) -> Bench:
    return Bench(ops, torch.device("cpu"), dtype, seed)


def test_kernels_are_interpreted_here() -> None:
    """Else this process imported triton before TRITON_INTERPRET was set, and nothing below could run."""
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(kernels_attention.decode_kernel, InterpretedFunction)


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """And fit their shared memory, and are not compiled again for other sizes of a batch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.engine.compile_kernels", str(capability)],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert {name for name, _ in found["compiled"]} == {
        name
        for module in (kernels_attention, kernels_elementwise, kernels_sampling)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert max(shared for _, shared in found["compiled"]) <= SHARED_BYTES[capability]
    assert found["again"] == []


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_decode_at_every_head_dim(dim: int) -> None:
    check_decode(bench(), Heads(dim=dim), [Row(1), Row(17), Row(130)])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (9, 3), (5, 1), (14, 2), (32, 1)])
def test_decode_at_every_group_size(num_heads: int, num_kv_heads: int) -> None:
    check_decode(bench(MANY), Heads(num_heads, num_kv_heads), [Row(33, 0), Row(5)], prefixes=[40])


def test_decode_in_half_precision() -> None:
    check_decode(bench(dtype=HALF), Heads(), [Row(33, 0), Row(65)], prefixes=[40])


def test_decode_of_one_row() -> None:
    check_decode(bench(), Heads(), [Row(1)])


def test_long_rows_are_split_and_short_ones_beside_them_have_empty_splits() -> None:
    check_decode(bench(MANY), Heads(num_heads=2, num_kv_heads=1), [Row(1), Row(700), Row(257), Row(256)])


def test_a_split_row_takes_its_prefix_in_once() -> None:
    check_decode(bench(MANY), Heads(num_heads=2, num_kv_heads=1), [Row(600, 0), Row(3, 0)], prefixes=[70])


def test_a_long_prefix_is_split_too() -> None:
    check_decode(bench(MANY), Heads(num_heads=2, num_kv_heads=1), [Row(3, 0), Row(300, 0), Row(4)], prefixes=[900])


@pytest.mark.parametrize("ops", [FEW, MANY])
def test_rows_of_several_groups_in_mixed_order(ops: TritonOps) -> None:
    rows = [Row(3, 1), Row(9, 0), Row(4), Row(2, 2), Row(5, 0), Row(1, 1), Row(7, 0), *[Row(6, 2)] * 20]
    check_decode(bench(ops), Heads(), rows, prefixes=[70, 1, 128])


@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_decode_in_a_sliding_window(window: int) -> None:
    """Windows that end inside the own keys, inside the prefix, and before both."""
    rows = [Row(3, 0), Row(30, 0), Row(90), Row(41, 0)]
    check_decode(bench(), Heads(window=window), rows, prefixes=[66])


def test_a_window_over_split_rows_and_a_split_prefix() -> None:
    heads = Heads(num_heads=2, num_kv_heads=1, window=800)
    check_decode(bench(MANY), heads, [Row(900), Row(300, 0), Row(10, 0)], prefixes=[600])


def test_decode_with_a_soft_cap() -> None:
    check_decode(bench(MANY), Heads(soft_cap=2.0), [Row(300, 0), Row(8), Row(2, 0)], prefixes=[33])


@pytest.mark.parametrize("prefixes", [[], [20, 50]])
def test_padding_rows_of_a_bucket_get_zeros_and_disturb_nobody(prefixes: list[int]) -> None:
    rows = [Row(9), Row(300)] if not prefixes else [Row(9, 0), Row(300, 1), Row(4)]
    check_decode(bench(MANY), Heads(), rows, prefixes, num_padding=3)


@pytest.mark.parametrize("max_length", [1, 300])
def test_rows_may_be_longer_than_the_host_said(max_length: int) -> None:
    check_decode(bench(MANY), Heads(num_heads=2, num_kv_heads=1), [Row(700, 0), Row(2)], [5], max_length=max_length)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_prefill_at_every_head_dim(dim: int) -> None:
    check_prefill(bench(), Heads(4, 2, dim), [Row(9, num_queries=9), Row(70, num_queries=66)])


def test_prefill_of_whole_prompts_and_of_chunks_that_continue() -> None:
    rows = [Row(1, num_queries=1), Row(64, num_queries=64), Row(130, num_queries=2), Row(129, num_queries=129)]
    check_prefill(bench(), Heads(num_heads=2, num_kv_heads=1), rows)


def test_prefill_in_half_precision_takes_large_tiles() -> None:
    rows = [Row(200, num_queries=190), Row(100, 0, num_queries=100)]
    check_prefill(bench(dtype=HALF), Heads(num_heads=2, num_kv_heads=1), rows, prefixes=[30])


@pytest.mark.parametrize("window", [0, 1, 7, 60])
def test_prefill_behind_shared_prefixes(window: int) -> None:
    rows = [Row(5, 0, 5), Row(40, 1, 30), Row(6, num_queries=6), Row(70, 0, 70)]
    check_prefill(bench(), Heads(num_heads=4, num_kv_heads=2, window=window), rows, prefixes=[65, 3])


def test_prefill_with_a_soft_cap() -> None:
    check_prefill(bench(), Heads(soft_cap=1.5), [Row(20, 0, 20), Row(7, num_queries=3)], prefixes=[9])


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("unit_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_norm(dtype: torch.dtype, unit_offset: float, with_delta: bool) -> None:
    check_norm(bench(dtype=dtype), 3, 80, unit_offset, with_delta)
    check_norm(bench(dtype=dtype), 1, 64, unit_offset, with_delta)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dims"), [(64, 64), (80, 80), (96, 72), (128, 32)])
def test_rope_writes_queries_keys_and_values(dim: int, rotary_dims: int, with_norm: bool) -> None:
    check_rope(bench(), Heads(9, 3, dim), num_tokens=4, rotary_dims=rotary_dims, with_norm=with_norm)


@pytest.mark.parametrize("with_norm", [True, False])
def test_layers_without_rotation_write_the_same_places(with_norm: bool) -> None:
    check_rope(bench(), Heads(4, 4, 80), num_tokens=3, rotary_dims=80, rotary=False, with_norm=with_norm)


def test_rope_in_half_precision() -> None:
    check_rope(bench(dtype=HALF), Heads(), num_tokens=1, rotary_dims=64, with_norm=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gated_activation(dtype: torch.dtype, activation: str) -> None:
    check_gated(bench(dtype=dtype), 3, 100, activation)
    check_gated(bench(dtype=dtype), 1, 2049, activation)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(KeyError, match="relu"):
        FEW.silu_mul(torch.zeros(1, 4), "relu")


def test_copies_read_every_source_before_any_target_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = ([1, 2, 3, 30, 9], [2, 3, 1, 9, 0])
    check_copy(bench(), 3, Heads(num_kv_heads=3, dim=80), *chain)
    check_copy(bench(), 1, Heads(), [], [])
    monkeypatch.setattr("batchinfer.engine.triton_ops._COPY_SCRATCH_BYTES", 2 * 2 * 5 * 3 * 80 * 4)
    check_copy(bench(), 5, Heads(num_kv_heads=3, dim=80), *chain)


def test_places_beyond_two_to_the_31_elements() -> None:
    """The arena's 8.6 GB are address space: only a few pages of it are touched."""
    check_far_places(bench(dtype=HALF))


def test_nothing_to_do_is_nothing() -> None:
    assert FEW.silu_mul(torch.empty(0, 8), "silu").shape == (0, 4)
    assert FEW.add_rms_norm(torch.empty(0, 8), None, torch.ones(8), 1e-5, 0.0)[1].shape == (0, 8)


SHAPE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MODELS = [
    LlamaConfig(**SHAPE),
    Gemma2Config(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    Exaone4Config(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.model_type)
def test_a_model_gives_the_same_logits_through_the_kernels(config: PreTrainedConfig) -> None:
    """Steps: a prefix and a whole prompt; then a row, a chunk behind the prefix and a relocation, all in one."""
    cpu = torch.device("cpu")
    facts = decoder_config(config)
    weights = random_weights(facts, dtype=torch.float32, device=cpu)
    plans = [
        StepPlan((), (), (PrefillChunk(7, 0, 11, 5, False), PrefillChunk(1, 0, 13, 20, True))),
        StepPlan((Copy(20, 40, 13),), (DecodeRow(1, 13, 40),), (PrefillChunk(2, 11, 20, 60, True, 5, 11),)),
        StepPlan((), (DecodeRow(2, 20, 60, 5, 11), DecodeRow(1, 14, 40)), ()),
    ]
    logits: list[list[torch.Tensor]] = []
    for ops in (MANY, TorchOps()):
        kv = kv_cache.allocate(facts, 96, torch.float32, cpu)
        decoder = Decoder(facts, weights, ops, 64)
        steps = (build(plan, lambda who, start, stop: [who + at for at in range(start, stop)], cpu) for plan in plans)
        logits.append([decoder.forward(step, kv) for step in steps])
    for through_kernels, through_torch in zip(*logits, strict=True):
        assert torch.isfinite(through_kernels).all()
        torch.testing.assert_close(through_kernels, through_torch, atol=1e-5, rtol=1e-4)


PREFIXES = st.lists(st.integers(1, 140), min_size=1, max_size=3)
SHAPES = st.sampled_from([Heads(2, 1, 64), Heads(6, 2, 64), Heads(3, 3, 80), Heads(4, 1, 96)])
WINDOWS = st.sampled_from([0, 0, 0, 1, 17, 90])
QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@QUICK
@given(st.data(), PREFIXES, SHAPES, WINDOWS, st.sampled_from([0.0, 0.0, 3.0]), st.sampled_from([FEW, MANY]))
def test_any_decode_batch(
    data: st.DataObject, prefixes: list[int], heads: Heads, window: int, soft_cap: float, ops: TritonOps
) -> None:
    owner = st.none() | st.integers(0, len(prefixes) - 1)
    rows = data.draw(st.lists(st.builds(Row, st.integers(1, 300), owner), min_size=1, max_size=5))
    heads = Heads(heads.num_heads, heads.num_kv_heads, heads.dim, soft_cap, window)
    check_decode(bench(ops, seed=len(rows)), heads, rows, prefixes)


@QUICK
@given(st.data(), PREFIXES, SHAPES, WINDOWS, st.sampled_from([torch.float32, HALF]))
def test_any_prefill_batch(
    data: st.DataObject, prefixes: list[int], heads: Heads, window: int, dtype: torch.dtype
) -> None:
    owner = st.none() | st.integers(0, len(prefixes) - 1)
    queries = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70), owner), min_size=1, max_size=3)
    rows = [Row(before + count, prefix, count) for count, before, prefix in data.draw(queries)]
    heads = Heads(heads.num_heads, heads.num_kv_heads, heads.dim, 0.0, window)
    check_prefill(bench(dtype=dtype, seed=len(rows)), heads, rows, prefixes)
