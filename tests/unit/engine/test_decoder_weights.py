"""Weights arrive whole: each tensor once, in its place, in the asked dtype; anything else is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from batchinfer.engine.decoder_weights import DecoderWeights, expected_shapes, load_weights, random_weights
from batchinfer.engine.linear import PlainLinear, linear
from batchinfer.errors import ModelError
from batchinfer.models.exaone import KEY_MAPPING
from tests.tiny import tiny_exaone3, tiny_exaone35_tied, tiny_llama, tiny_phi3, tiny_qwen2
from tests.unit.engine.decoder_worlds import CPU, SUPPORTED, facts, key_mapping, native_config, weight_paths

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Tensors = dict[str, torch.Tensor]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return load_weights(
        facts(directory), weight_paths(directory), dtype=dtype, device=CPU, key_mapping=key_mapping(directory)
    )


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def matrix(product: object) -> torch.Tensor:
    assert isinstance(product, PlainLinear)
    return product.weight_OI


def test_queries_keys_and_values_lie_below_one_another(tmp_path: Path) -> None:
    weights = load(tiny_qwen2(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    layer = weights.layers[1]
    parts = [stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(matrix(layer.qkv), torch.cat(parts))
    assert isinstance(layer.qkv, PlainLinear)
    assert layer.qkv.bias_O is not None
    biases = [stored[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "qkv"]
    assert torch.equal(layer.qkv.bias_O, torch.cat(biases))
    gate_up = [stored[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(matrix(layer.gate_up), torch.cat(gate_up))
    assert torch.equal(matrix(weights.head), stored["lm_head.weight"])


def test_fused_checkpoints_are_taken_as_they_are(tmp_path: Path) -> None:
    weights = load(tiny_phi3(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(matrix(weights.layers[0].qkv), stored["model.layers.0.self_attn.qkv_proj.weight"])
    assert torch.equal(matrix(weights.layers[0].gate_up), stored["model.layers.0.mlp.gate_up_proj.weight"])


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    whole = load(tiny_exaone3(tmp_path / "whole"))
    parts = load(tiny_exaone3(tmp_path / "parts", num_weight_files=3))
    assert len(weight_paths(tmp_path / "parts")) == 3
    for layer, other in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(matrix(layer.qkv), matrix(other.qkv))
        assert torch.equal(matrix(layer.down), matrix(other.down))
    assert torch.equal(whole.embedding_VE, parts.embedding_VE)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_checkpoint_holds_what_is_expected_and_nothing_else(family: str, tmp_path: Path) -> None:
    directory = SUPPORTED[family](tmp_path)
    names = {path: load_file(path) for path in weight_paths(directory)}
    stored = {name: tuple(tensor.shape) for tensors in names.values() for name, tensor in tensors.items()}
    if key_mapping(directory) is None:
        assert stored == expected_shapes(facts(directory))
    weights = load(directory)
    assert len(weights.layers) == native_config(directory).num_hidden_layers


def test_weights_are_cast_one_by_one(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    weights = load(directory, torch.float16)
    stored = load_file(directory / "model.safetensors")
    assert weights.dtype == torch.float16
    assert torch.equal(weights.embedding_VE, stored["model.embed_tokens.weight"].half())
    assert torch.equal(matrix(weights.layers[0].out), stored["model.layers.0.self_attn.o_proj.weight"].half())


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    weights = load(tiny_exaone35_tied(tmp_path))
    assert matrix(weights.head) is weights.embedding_VE


def test_a_tied_head_that_is_stored_too_is_dropped_only_where_it_is_equal(tmp_path: Path) -> None:
    """As transformers does: it ties equal weights and otherwise believes the weights, not the configuration."""
    directory = tiny_exaone35_tied(tmp_path)
    rewrite(directory, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    weights = load(directory)
    assert matrix(weights.head) is weights.embedding_VE
    rewrite(directory, lambda w: w["lm_head.weight"].mul_(2))
    weights = load(directory)
    assert torch.equal(matrix(weights.head), 2 * weights.embedding_VE)


def test_a_tied_checkpoint_may_hold_the_head_in_place_of_the_embedding(tmp_path: Path) -> None:
    directory = tiny_exaone35_tied(tmp_path)
    rewrite(directory, lambda w: w.update({"lm_head.weight": w.pop("transformer.wte.weight")}))
    assert matrix(load(directory).head).shape == load(directory).embedding_VE.shape


def test_tables_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    rewrite(directory, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(directory)


def test_missing_foreign_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path)

    def spoil(weights: Tensors) -> None:
        del weights["transformer.h.1.ln_2.weight"]
        weights["transformer.h.2.ln_1.weight"] = torch.ones(32)
        weights["transformer.h.0.mlp.c_proj.weight"] = torch.ones(3, 48)

    rewrite(directory, spoil)
    with pytest.raises(ModelError) as refused:
        load(directory)
    assert "1 missing: model.layers.1.post_attention_layernorm.weight" in str(refused.value)
    assert "1 left over: model.layers.2.input_layernorm.weight" in str(refused.value)
    assert "model.layers.0.mlp.down_proj.weight is [3, 48], should be [32, 48]" in str(refused.value)


def test_a_forgotten_key_mapping_is_refused(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path)
    with pytest.raises(ModelError, match=r"20 missing: .*; 20 left over: "):
        load_weights(facts(directory), weight_paths(directory), dtype=torch.float32, device=CPU)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path)
    rewrite(directory, lambda w: w.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(ModelError, match=r"two tensors for model.norm.weight"):
        load_weights(
            facts(directory), weight_paths(directory), dtype=torch.float32, device=CPU, key_mapping=KEY_MAPPING
        )


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, lambda w: w.update({name: w[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=rf"1 quantised: {name} \(F8_E4M3\)"):
        load(directory)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    (directory / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read .*download it again"):
        load(directory)


def test_random_weights_have_the_shapes_of_real_ones(tmp_path: Path) -> None:
    directory = tiny_qwen2(tmp_path)
    real, made = load(directory), random_weights(facts(directory), dtype=torch.float32, device=CPU)
    assert matrix(made.layers[0].qkv).shape == matrix(real.layers[0].qkv).shape
    assert matrix(made.head).shape == matrix(real.head).shape
    again = random_weights(facts(directory), dtype=torch.float32, device=CPU)
    assert torch.equal(matrix(made.layers[1].down), matrix(again.layers[1].down))


@pytest.mark.parametrize("num_rows", [1, 7, 130])
def test_packed_products_are_the_plain_ones(num_rows: int) -> None:
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(num_rows, 32)
    packed = linear(weight.bfloat16(), bias.bfloat16())
    if isinstance(packed, PlainLinear):
        pytest.skip("this torch or CPU does not pack bfloat16")
    product = packed(x.bfloat16())
    assert product.dtype == torch.bfloat16
    exact = functional.linear(x.bfloat16().float(), weight.bfloat16().float(), bias.bfloat16().float())
    torch.testing.assert_close(product.float(), exact, atol=0.05, rtol=0.01)


def test_only_bfloat16_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(linear(torch.randn(4, 4)), PlainLinear)
    monkeypatch.setattr("batchinfer.engine.linear._can_pack", lambda: False)
    assert isinstance(linear(torch.randn(4, 4).bfloat16()), PlainLinear)


def test_no_files_at_all_are_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path)
    with pytest.raises(ModelError, match="no weight files: the weights do not fit"):
        load_weights(facts(directory), [], dtype=torch.float32, device=CPU)
