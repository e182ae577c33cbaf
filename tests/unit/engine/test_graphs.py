"""Graphed decode steps on a CPU: a recorder that runs the step again stands for the device's graph.

What it proves is what a graph depends on: everything a step reads lies in the recorded tensors, filled anew each
time, and padding touches nobody's places.
"""

import importlib.util
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.graphs import GraphedDecoder, Replay, graph_sizes
from batchinfer.engine.kernel_shapes import DeviceLimits
from batchinfer.engine.kv_cache import KvCache
from batchinfer.engine.ops import Ops
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.step_plan import DecodeRow, StepPlan
from batchinfer.engine.step_tensors import StepTensors, build
from batchinfer.engine.torch_ops import TorchOps
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import EOS, drain, ragged_prompts, sequences, tiny_decoder, tiny_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install -c constraints.txt triton)", allow_module_level=True)

from batchinfer.engine.triton_ops import TritonOps

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's graphs are in tests/gpu/test_graphs_gpu.py")
KERNELS = TritonOps(DeviceLimits(num_multiprocessors=1, shared_bytes=100_000), has_flash=False)
FAMILIES = ("llama", "gemma2", "exaone4")
GREEDY = SamplingParams(max_new_tokens=24)


class ForgetfulOps(TorchOps):
    """Looks at the index tensors in every call, as kernels do; TorchOps works a step's layout out once."""

    def rope_and_write(self, *args: Any) -> torch.Tensor:
        return TorchOps().rope_and_write(*args)

    def decode_attention(self, *args: Any) -> torch.Tensor:
        return TorchOps().decode_attention(*args)


class Recorder:
    """Keeps the step and runs it again into the same output; counts both."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Replay]:
        output = step()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            output.copy_(step())

        return output, replay


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    return {
        family: tiny_decoder(tiny_model(family), tmp_path_factory.mktemp(family), ForgetfulOps()) for family in FAMILIES
    }


def engine(decoder: Decoder | GraphedDecoder, kv: kv_cache.KvCache, limits: Limits, ahead: int) -> ContinuousEngine:
    return ContinuousEngine(
        decoder, kv, limits, eos_token_ids=[EOS], max_model_len=512, num_steps_ahead=ahead, decode=None
    )


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_equal_eager_ones(decoders: dict[str, Decoder], family: str, ahead: int) -> None:
    """Ragged rows, growth, preemption and shared prefixes; the arena is small, so places are used again and again."""
    decoder = decoders[family]
    limits = Limits(num_places=700, max_rows=12, max_step_tokens=96)
    head = ragged_prompts(1, seed=5)[0] * 8
    prompts = [*ragged_prompts(14, seed=1), *(head[:40] + tail for tail in ragged_prompts(10, seed=2))]
    submitted = sequences(prompts, GREEDY)

    eager_kv = kv_cache.allocate(decoder.config, limits.num_places + 1, torch.float32, CPU)
    expected = {key: end.token_ids for key, end in drain(engine(decoder, eager_kv, limits, ahead), submitted).items()}

    kv = kv_cache.allocate(decoder.config, limits.num_places + 1, torch.float32, CPU)
    record = Recorder()
    graphed = GraphedDecoder(decoder, kv, limits.max_rows, record)
    found = {key: end.token_ids for key, end in drain(engine(graphed, kv, limits, ahead), submitted).items()}

    assert found == expected
    assert record.num_replayed > 20
    assert 2 <= record.num_recorded == graphed.num_graphs <= 2 * len(graph_sizes(limits.max_rows))


def _random_step(generator: random.Random, num_rows: int, num_groups: int) -> StepTensors:
    """Decode rows at new places every time, some behind one of ``num_groups`` prefixes in the first 64 places."""
    extents = generator.sample(range(4, 22), num_rows)
    rows = []
    for number, extent in enumerate(extents):
        group = generator.randrange(num_groups + 1)
        prefix_length = 0 if group == num_groups else 7 + 9 * group
        position = prefix_length + generator.randrange(16)
        rows.append(DecodeRow(number, position, 16 * extent, 8 * group if prefix_length else 0, prefix_length))
    return build(StepPlan((), tuple(rows), ()), lambda *_: [generator.randrange(90)], CPU)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("ops", [ForgetfulOps(), pytest.param(KERNELS, marks=INTERPRETED)], ids=["torch", "kernels"])
def test_each_replay_reads_and_writes_only_what_its_step_says(decoders: dict[str, Decoder], ops: Ops) -> None:
    """Rows, places and groups change from step to step; afterwards both arenas are equal but for padding's place."""
    eager = Decoder(decoders["llama"].config, decoders["llama"]._weights, ops, 512)
    torch.manual_seed(0)
    # In memory as on a GPU, which the kernels insist on.
    shape = (eager.config.num_layers, 400, eager.config.num_kv_heads, eager.config.head_dim)
    arenas = [KvCache(torch.randn(shape), torch.randn(shape))]
    arenas.append(KvCache(arenas[0].keys_LNKD.clone(), arenas[0].values_LNKD.clone()))
    graphed = GraphedDecoder(eager, arenas[1], 12, Recorder())
    generator = random.Random(0)
    # The largest first, so that smaller steps find their rows and groups behind theirs.
    for num_rows, num_groups in ((12, 6), (9, 2), (12, 0), (10, 0), (5, 4), (7, 1), (3, 2), (2, 0), (1, 0), (11, 6)):
        step = _random_step(generator, num_rows, num_groups)
        expected = eager.forward(step, arenas[0])
        torch.testing.assert_close(graphed.forward(step, arenas[1]), expected, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(
            (arenas[1].keys_LNKD, arenas[1].values_LNKD), (arenas[0].keys_LNKD, arenas[0].values_LNKD), strict=True
        ):
            torch.testing.assert_close(ours[:, :-1], theirs[:, :-1], atol=1e-5, rtol=1e-5)


def test_sizes_reach_the_limit_and_waste_little() -> None:
    for max_rows in (1, 6, 8, 100, 256, 1000, 1024):
        sizes = graph_sizes(max_rows)
        assert sizes[-1] == max_rows
        assert list(sizes) == sorted(set(sizes))
        for num_rows in range(1, max_rows + 1):
            size = next(size for size in sizes if size >= num_rows)
            assert size - num_rows <= max(7, num_rows / 8)


def test_sizes_are_few() -> None:
    assert len(graph_sizes(1024)) <= 45
