"""Steps run before the first sequence: they compile every kernel, and show that the kernels are right on a GPU.

A GPU's kernel is compiled for each combination of the options that ``triton_ops`` chooses from a step's shapes; the
plans here walk through them, so that nothing is compiled in the middle of a job. Each step also runs in plain torch
over an arena of its own, and the distance of the two is what tells a GPU on which a kernel goes wrong.
"""

from collections.abc import Iterator

import torch

from batchinfer.engine.decoder import Decoder
from batchinfer.engine.kv_cache import KvCache
from batchinfer.engine.sampler import Sampler, SamplerRow
from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk, StepPlan
from batchinfer.engine.step_tensors import build
from batchinfer.records import SamplingParams

__all__ = ["MAX_DISTANCE", "compile_kernels", "warm_up", "warm_up_plans"]

#: Rounding to bfloat16 in every layer leaves distances of a few percent; a wrong kernel leaves about 1.
MAX_DISTANCE = 0.15
#: Lengths on both sides of every choice: rows of a split decode, queries of a prefill tile.
_LONG, _SHORT = 640, 16
#: Decode rows, and with them the sizes of prefix groups.
_NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@torch.inference_mode()
def warm_up(decoder: Decoder, plain: Decoder, max_positions: int) -> float:
    """Run every plan with the decoder and with its plain twin over the same weights.

    Returns the largest ``|logits - plain| / |plain|`` of all steps, infinite where a logit is not finite: above
    ``MAX_DISTANCE`` the decoder's kernels must not be used. Takes two arenas of a thousand places for the time being.
    """
    arenas = [_zeros(decoder, 2 * _LONG), _zeros(decoder, 2 * _LONG)]
    worst = 0.0
    for plan in warm_up_plans(2 * _LONG, max_positions):
        step = build(plan, lambda _, start, stop: _tokens(decoder, start, stop), decoder.device)
        found, expected = (each.forward(step, kv).float() for each, kv in zip((decoder, plain), arenas, strict=True))
        distance = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        # A NaN compares false with everything, so it is asked for.
        worst = max(worst, distance) if distance == distance else float("inf")
    _draw_once(decoder)
    return worst


@torch.inference_mode()
def compile_kernels(decoder: Decoder) -> None:
    """One step of three tokens: on a CPU all shapes share a kernel. Some 15 s the first time on a machine."""
    plan = StepPlan((), (DecodeRow(1, 0, 2),), (PrefillChunk(0, 0, 2, 0, True),))
    step = build(plan, lambda _, start, stop: _tokens(decoder, start, stop), decoder.device)
    decoder.forward(step, _zeros(decoder, 3))


def _draw_once(decoder: Decoder) -> None:
    """From a distribution so flat that top_p needs the whole vocabulary, which has a kernel of its own."""
    sampler = Sampler(decoder.config.vocab_size, decoder.device)
    sampler.extend([SamplerRow(SamplingParams(temperature=1.0, top_p=0.9), 0, (), (), ())])
    sampler.sample(torch.zeros(1, decoder.config.vocab_size, dtype=decoder.dtype, device=decoder.device))


def warm_up_plans(num_places: int, max_positions: int) -> Iterator[StepPlan]:
    """Plans that fit an arena of ``num_places`` places; sequences overlap there, as none is real."""
    long = min(_LONG, num_places // 2, max_positions - 2)
    short = min(_SHORT, long)
    for length in (short, long):
        for prefix in (0, short):
            if prefix + length >= max_positions:
                continue
            chunk = PrefillChunk(0, prefix, prefix + length, prefix, True, 0, prefix)
            yield StepPlan((), (), (chunk,))
            yield StepPlan((), (DecodeRow(1, length, 0),), (chunk,))
    for num_rows in _NUM_ROWS:
        for prefix in (0, short):
            rows = (DecodeRow(number, long - 1, prefix, 0, prefix) for number in range(num_rows))
            yield StepPlan((), tuple(rows), ())
    yield StepPlan((Copy(0, short, short),), (DecodeRow(0, 2 * short - 1, 0),), ())


def _tokens(decoder: Decoder, start: int, stop: int) -> list[int]:
    """By position alone: rows that share a place write the same to it."""
    return [position * 7919 % decoder.config.vocab_size for position in range(start, stop)]


def _zeros(decoder: Decoder, num_places: int) -> KvCache:
    config = decoder.config
    shape = (config.num_layers, num_places, config.num_kv_heads, config.head_dim)
    keys, values = (torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
    return KvCache(keys, values)
