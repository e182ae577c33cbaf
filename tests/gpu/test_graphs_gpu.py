"""CUDA graphs of decode steps: the same logits as eager steps, and no kernel compiled after the warm-up."""

import importlib.util
import random

import pytest
import torch
from transformers import LlamaConfig

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from batchinfer.engine import kv_cache  # noqa: E402
from batchinfer.engine.decoder import Decoder  # noqa: E402
from batchinfer.engine.decoder_config import decoder_config  # noqa: E402
from batchinfer.engine.decoder_weights import random_weights  # noqa: E402
from batchinfer.engine.graphs import GraphedDecoder, cuda_recorder  # noqa: E402
from batchinfer.engine.kv_cache import KvCache  # noqa: E402
from batchinfer.engine.step_plan import DecodeRow, StepPlan  # noqa: E402
from batchinfer.engine.step_tensors import StepTensors, build  # noqa: E402
from batchinfer.engine.triton_ops import TritonOps  # noqa: E402
from batchinfer.engine.warm_up import warm_up  # noqa: E402

DEVICE = torch.device("cuda")
MAX_POSITIONS = 4096


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = decoder_config(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
        )
    )
    weights = random_weights(config, dtype=torch.bfloat16, device=DEVICE)
    return Decoder(config, weights, TritonOps.of(DEVICE), MAX_POSITIONS)


def _random_step(generator: random.Random, num_rows: int, num_groups: int) -> StepTensors:
    rows = []
    for number, extent in enumerate(generator.sample(range(8, 200), num_rows)):
        group = generator.randrange(num_groups + 1)
        prefix_length = 0 if group == num_groups else 7 + 9 * group
        position = prefix_length + generator.randrange(64)
        rows.append(DecodeRow(number, position, 64 * extent, 8 * group if prefix_length else 0, prefix_length))
    return build(StepPlan((), tuple(rows), ()), lambda *_: [generator.randrange(1000)], DEVICE)


@torch.inference_mode()
def test_graphs_equal_eager_steps(decoder: Decoder) -> None:
    arenas = [kv_cache.allocate(decoder.config, 64 * 200 + 1, torch.bfloat16, DEVICE)]
    for arena in (arenas[0].keys_LNKD, arenas[0].values_LNKD):
        arena.normal_()
    arenas.append(KvCache(arenas[0].keys_LNKD.clone(), arenas[0].values_LNKD.clone()))
    graphed = GraphedDecoder(decoder, arenas[1], 150, cuda_recorder(DEVICE))
    generator = random.Random(0)
    for num_rows, num_groups in ((150, 20), (100, 3), (150, 0), (33, 0), (90, 7), (1, 0), (2, 1), (150, 20)) * 2:
        step = _random_step(generator, num_rows, num_groups)
        expected = decoder.forward(step, arenas[0]).float()
        found = graphed.forward(step, arenas[1]).float()
        # The grids differ (splits are cut for other lengths), and with them the order of additions.
        assert (found - expected).norm() <= 2e-2 * expected.norm()
    assert graphed.num_graphs >= 6


def test_nothing_is_compiled_after_the_warm_up(decoder: Decoder) -> None:
    from triton import knobs

    kv = kv_cache.allocate(decoder.config, 64 * 200 + 1, torch.bfloat16, DEVICE)
    warm_up(decoder, kv, MAX_POSITIONS)
    compiled: list[object] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **hook: compiled.append(hook["repr"])
    try:
        generator = random.Random(1)
        for num_rows, num_groups in ((1, 0), (150, 5), (128, 0), (17, 2)):
            decoder.forward(_random_step(generator, num_rows, num_groups), kv)
        torch.cuda.synchronize()
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled
