import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from batchinfer.errors import ModelError
from batchinfer.models.exaone import KEY_MAPPING, expected_tensors, llama_config_values
from batchinfer.models.files import read_config
from batchinfer.models.safetensors_header import read_safetensors_header
from tests.tiny import tiny_exaone3, tiny_exaone35, tiny_exaone35_tied

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: The fields of the published configurations that matter.
EXAONE_30_7_8B = {
    "model_type": "exaone",
    "vocab_size": 102400,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096,
    "activation_function": "silu",
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 500000,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXAONE_35_2_4B = EXAONE_30_7_8B | {
    "hidden_size": 2560,
    "num_layers": 30,
    "intermediate_size": 7168,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rope_scaling": LLAMA3_ROPE,
}
del EXAONE_35_2_4B["tie_word_embeddings"]
EXAONE_35_32B = EXAONE_35_2_4B | {
    "hidden_size": 5120,
    "num_layers": 64,
    "num_attention_heads": 40,
    "intermediate_size": 27392,
    "tie_word_embeddings": False,
}


def num_parameters(config: Mapping[str, object]) -> int:
    total = 0
    for shape in expected_tensors(config).values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


@pytest.mark.parametrize(
    ("config", "billions"), [(EXAONE_30_7_8B, 7.818), (EXAONE_35_2_4B, 2.405), (EXAONE_35_32B, 32.003)]
)
def test_expected_tensors_add_up_to_the_published_sizes(config: dict[str, object], billions: float) -> None:
    assert round(num_parameters(config) / 1e9, 3) == billions


def test_exaone_30_becomes_llama_without_rope_scaling() -> None:
    assert llama_config_values(EXAONE_30_7_8B) == {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 361,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 500000, "rope_type": "default"},
    }


def test_exaone_35_keeps_its_rope_scaling_and_a_missing_tie_key_means_tied() -> None:
    values = llama_config_values(EXAONE_35_2_4B)
    assert values["rope_parameters"] == {"rope_theta": 1000000, **LLAMA3_ROPE}
    assert values["tie_word_embeddings"] is True
    assert values["head_dim"] == 80
    assert "lm_head.weight" not in expected_tensors(EXAONE_35_2_4B)


def test_rope_parameters_of_transformers_5_and_the_old_type_key_are_understood() -> None:
    new = llama_config_values(
        {**EXAONE_30_7_8B, "rope_theta": 1.0, "rope_parameters": {"rope_theta": 7.0, **LLAMA3_ROPE}}
    )
    assert new["rope_parameters"] == {"rope_theta": 7.0, **LLAMA3_ROPE}
    old = llama_config_values({**EXAONE_30_7_8B, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old["rope_parameters"] == {"rope_theta": 500000, "rope_type": "linear", "factor": 2.0}


def test_missing_fields_take_exaones_defaults_not_llamas() -> None:
    values = llama_config_values({"model_type": "exaone", "num_key_value_heads": None, "intermediate_size": None})
    assert values["vocab_size"] == 102400
    assert values["rms_norm_eps"] == 1e-5
    assert values["num_key_value_heads"] == values["num_attention_heads"] == 32
    assert values["intermediate_size"] == 4 * 2048
    assert values["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"rope_scaling": 8}, "rope_scaling"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_by_field(change: dict[str, object], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        llama_config_values({**EXAONE_30_7_8B, **change})


@pytest.mark.parametrize("write", [tiny_exaone3, tiny_exaone35, tiny_exaone35_tied])
def test_expected_tensors_are_those_of_a_checkpoint(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    directory = write(tmp_path)
    header = read_safetensors_header(directory / "model.safetensors")
    assert expected_tensors(read_config(directory)) == {name: entry.shape for name, entry in header.tensors.items()}


def test_key_mapping_renames_every_tensor_once_and_to_llamas_names() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = EXAONE_30_7_8B | {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 24, "vocab_size": 32}
    renamed = {}
    for name, shape in expected_tensors(config).items():
        new = name
        for pattern, replacement in KEY_MAPPING.items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = shape
    model = LlamaForCausalLM(LlamaConfig(**llama_config_values(config)))
    assert renamed == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
