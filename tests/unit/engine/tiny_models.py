"""Tiny random models straight from their configs, the lean decoder over them, and small builders for sequences."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Exaone4Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.exaone_moe import ExaoneMoeConfig

from batchinfer.engine.build import device_ops
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import decoder_config
from batchinfer.engine.decoder_weights import load_weights
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.ops import Ops
from batchinfer.engine.padded import PaddedEngine
from batchinfer.records import Prompt, SamplingParams

VOCAB = 97
EOS = 2
PAD = 0

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "initializer_range": 0.4,
}

_CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_hidden_layers=2),
    "gemma2": lambda: Gemma2Config(**_SHAPE, num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=8),
    "exaone4": lambda: Exaone4Config(
        **_SHAPE, num_hidden_layers=4, sliding_window=8, sliding_window_pattern=4, tie_word_embeddings=False
    ),
    "exaone_moe": lambda: ExaoneMoeConfig(
        **_SHAPE,
        num_hidden_layers=4,
        sliding_window=8,
        sliding_window_pattern=4,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    ),
    "qwen2": lambda: Qwen2Config(**_SHAPE, num_hidden_layers=2),
    "phi3": lambda: Phi3Config(**_SHAPE, num_hidden_layers=2, sliding_window=8),
    "mistral": lambda: MistralConfig(**_SHAPE, num_hidden_layers=2, sliding_window=8),
}

FAMILIES = tuple(_CONFIGS)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 CPU model whose greedy texts vary (large initial weights) and end at EOS now and then."""
    torch.manual_seed(seed)
    # Gemma 2's capped attention scores exist in eager attention only.
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](), attn_implementation=attention, dtype=torch.float32)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.eval()


def tiny_decoder(model: PreTrainedModel, directory: Path, ops: Ops | None = None, max_positions: int = 512) -> Decoder:
    """The lean decoder over the model's weights, by way of its files in ``directory``; float32 on the CPU."""
    model.save_pretrained(directory)
    config = decoder_config(model.config)
    files = sorted(directory.glob("*.safetensors"))
    weights = load_weights(config, files, dtype=torch.float32, device=torch.device("cpu"))
    return Decoder(config, weights, ops or device_ops(torch.device("cpu"), torch.float32), max_positions)


def ragged_prompts(num: int, seed: int = 0, longest: int = 24) -> list[tuple[int, ...]]:
    """Token ids of skewed lengths 1..longest without special ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + int(longest * float(u) ** 2) for u in torch.rand(num, generator=generator)]
    return [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def sequences(
    prompts: Iterable[tuple[int, ...]], sampling: SamplingParams, *, overrides: dict[int, SamplingParams] | None = None
) -> list[Sequence]:
    """``sampling.n`` sequences per prompt; row ids are ``shard:<index>``."""
    return [
        Sequence(Prompt(f"shard:{index}", prompt, chosen), sample)
        for index, prompt in enumerate(prompts)
        for chosen in [(overrides or {}).get(index, sampling)]
        for sample in range(chosen.n)
    ]


def padded(model: PreTrainedModel, **arguments: Any) -> PaddedEngine:
    """A padded engine with the tiny models' ids and a limit far away."""
    defaults: dict[str, Any] = {"eos_token_ids": [EOS], "pad_token_id": PAD, "max_model_len": 512}
    return PaddedEngine(model, **{**defaults, **arguments})


def drain(engine: Any, submitted: Iterable[Sequence], max_steps: int = 100_000) -> dict[tuple[str, int], Generation]:
    """Submit, step to the end; generations by sequence id, each exactly once."""
    engine.submit(submitted)
    ends: dict[tuple[str, int], Generation] = {}
    for _ in range(max_steps):
        if engine.num_unfinished == 0:
            return ends
        for end in engine.step():
            assert end.sequence.sequence_id not in ends
            ends[end.sequence.sequence_id] = end
    raise AssertionError(f"{engine.num_unfinished} sequences unfinished after {max_steps} steps")


def generate_alone(model: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int, **options: Any) -> list[int]:
    """New tokens of transformers' own greedy ``generate`` for one prompt."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    return output[0, len(prompt) :].tolist()
