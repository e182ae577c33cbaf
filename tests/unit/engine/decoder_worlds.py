"""Tiny models beside their transformers twin, and an arena to run plans in by hand."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Exaone4Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from batchinfer.engine import kv_cache, step_tensors
from batchinfer.engine.build import device_ops
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import DecoderConfig, decoder_config
from batchinfer.engine.decoder_weights import load_weights
from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk, StepPlan
from batchinfer.models.exaone import EXAONE3, KEY_MAPPING, llama_config_values
from batchinfer.models.loading import load_model
from tests.tiny import MAX_MODEL_LEN, TINY, VOCAB_SIZE

CPU = torch.device("cpu")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": 0,
}


def _written(build: Callable[[], PreTrainedConfig]) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(build())
            for name, weight in model.named_parameters():
                if name.endswith(".bias"):
                    torch.nn.init.normal_(weight, std=0.2)
            model.save_pretrained(directory)
        return directory

    return write


#: Directory writers of every kind of model the decoder runs: the families of ``tiny`` and what they leave out.
SUPPORTED: dict[str, Callable[[Path], Path]] = {
    **{name: write for name, write in TINY.items() if name != "exaone_moe"},
    "qwen3": _written(lambda: Qwen3Config(**_SIZES, head_dim=16)),
    "qwen2_windows": _written(
        lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "llama_biases": _written(lambda: LlamaConfig(**_SIZES, head_dim=8, attention_bias=True, mlp_bias=True)),
    "phi3_partial": _written(
        lambda: Phi3Config(
            **_SIZES,
            original_max_position_embeddings=MAX_MODEL_LEN,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        )
    ),
    "exaone4_global": _written(
        lambda: Exaone4Config(
            **_SIZES,
            sliding_window=None,
            layer_types=["full_attention"] * 3,
            tie_word_embeddings=True,
        )
    ),
}


def native_config(directory: Path) -> PreTrainedConfig:
    """The configuration as the engine gets it: EXAONE 3.x as the Llama it is."""
    raw = json.loads((directory / "config.json").read_text())
    if raw["model_type"] == EXAONE3:
        values: dict[str, Any] = llama_config_values(raw)
        return LlamaConfig(**values)
    return AutoConfig.from_pretrained(directory)


def weight_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def key_mapping(directory: Path) -> dict[str, str] | None:
    raw = json.loads((directory / "config.json").read_text())
    return KEY_MAPPING if raw["model_type"] == EXAONE3 else None


@dataclass
class World:
    """One model twice, token ids of some sequences (indexed by holder), and a KV arena."""

    decoder: Decoder
    reference: PreTrainedModel
    kv: kv_cache.KvCache
    tokens: list[list[int]]

    def run(
        self,
        *,
        decode: Sequence[DecodeRow] = (),
        prefill: Sequence[PrefillChunk] = (),
        copies: Sequence[Copy] = (),
    ) -> torch.Tensor:
        plan = StepPlan(copies=tuple(copies), decode=tuple(decode), prefill=tuple(prefill))
        step = step_tensors.build(plan, lambda holder, start, stop: self.tokens[holder][start:stop], CPU)
        return self.decoder.forward(step, self.kv)

    def expected(self, holder: int, position: int) -> torch.Tensor:
        """transformers' logits after a sequence's token at ``position``, the sequence being alone."""
        with torch.no_grad():
            return self.reference(torch.tensor([self.tokens[holder][: position + 1]])).logits[0, -1]

    def assert_close(self, logits: torch.Tensor, *ends: tuple[int, int], atol: float = 5e-5) -> None:
        """Row i of the logits follows token ``ends[i] = (holder, position)``."""
        assert logits.shape == (len(ends), VOCAB_SIZE)
        for row, (holder, position) in zip(logits, ends, strict=True):
            torch.testing.assert_close(row.float(), self.expected(holder, position), atol=atol, rtol=0)


def make_world(
    directory: Path, lengths: Sequence[int], *, dtype: torch.dtype = torch.float32, num_places: int = 512
) -> World:
    """``lengths`` are those of random sequences; what was never written in the arena is not zero but garbage."""
    config = decoder_config(native_config(directory))
    weights = load_weights(config, weight_paths(directory), dtype=dtype, device=CPU, key_mapping=key_mapping(directory))
    kv = kv_cache.allocate(config, num_places, dtype, CPU)
    generator = torch.Generator().manual_seed(1)
    for arena in (kv.keys_LNKD, kv.values_LNKD):
        arena.copy_(100 * torch.randn(arena.shape, generator=generator))
    return World(
        decoder=Decoder(config, weights, device_ops(CPU, dtype), MAX_MODEL_LEN),
        reference=load_model(directory, dtype="float32", device="cpu").model,
        kv=kv,
        tokens=[torch.randint(2, VOCAB_SIZE - 1, (n,), generator=generator).tolist() for n in lengths],
    )


def facts(directory: Path) -> DecoderConfig:
    return decoder_config(native_config(directory))
