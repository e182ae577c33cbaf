"""Which models the decoder takes, and what it reads of them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Exaone4Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.exaone_moe import ExaoneMoeConfig

from batchinfer.engine.decoder_config import Llama3Scaling, decoder_config, supported
from batchinfer.errors import ModelError
from tests.unit.engine.decoder_worlds import SUPPORTED, native_config

_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}


@pytest.mark.parametrize("family", SUPPORTED)
def test_written_checkpoints_are_supported(family: str, tmp_path: Path) -> None:
    assert supported(native_config(SUPPORTED[family](tmp_path))) is None


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), MistralConfig(), Qwen2Config(), Qwen3Config(), Phi3Config(), Exaone4Config(), Gemma2Config()],
    ids=lambda config: str(config.model_type),
)
def test_families_defaults_are_supported(config: PreTrainedConfig) -> None:
    assert supported(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ExaoneMoeConfig(), "model type exaone_moe: the continuous engine knows exaone4, gemma2, llama"),
        (LlamaConfig(hidden_act="gelu"), "activation gelu"),
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=5), "32 attention heads over 5"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope type linear"),
        (Phi3Config(rope_parameters=_LONG), "rope type longrope"),
        (Qwen2Config(layer_types=["chunked_attention"] * 32), "layers of type chunked_attention"),
        (Qwen2Config(layer_types=["sliding_attention"] * 32), "sliding layers without a sliding_window"),
        (Gemma2Config(use_bidirectional_attention=True), "bidirectional attention"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.model_type),
)
def test_what_cannot_be_computed_exactly_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    said = supported(config)
    assert said is not None
    assert reason in said
    with pytest.raises(ModelError, match="continuous engine"):
        decoder_config(config)


def test_quantised_checkpoints_are_refused() -> None:
    config: Any = LlamaConfig()
    config.quantization_config = {"quant_method": "awq"}
    assert "quantised" in str(supported(config))


def test_hybrid_exaone_rotates_where_it_slides() -> None:
    config = decoder_config(Exaone4Config(num_hidden_layers=4, sliding_window=4096, sliding_window_pattern=4))
    assert config.windows == (4096, 4096, 4096, 0)
    assert config.rotates == (True, True, True, False)
    assert config.names.before_attention is None


def test_exaone_without_windows_rotates_everywhere() -> None:
    config = decoder_config(Exaone4Config(num_hidden_layers=2, sliding_window=None, layer_types=["full_attention"] * 2))
    assert config.windows == (0, 0)
    assert config.rotates == (True, True)


def test_gemma_scales_caps_and_offsets() -> None:
    config = decoder_config(Gemma2Config(hidden_size=2304, query_pre_attn_scalar=144))
    assert (config.score_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.score_scale == 144**-0.5
    assert config.embedding_scale == 2304**0.5
    assert config.norm_unit_offset == 1.0
    assert config.windows[:2] == (4096, 0)


def test_llama3_scaling_is_read_from_either_spelling() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    new = LlamaConfig(
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e6, "original_max_position_embeddings": 8192, **scaling}
    )
    old = LlamaConfig(
        rope_theta=1e6, rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    )
    for config in (new, old):
        assert decoder_config(config).rotary.scaling == expected
        assert decoder_config(config).rotary.theta == 1e6
