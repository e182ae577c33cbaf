import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from batchinfer.errors import ModelError
from batchinfer.models.loading import LoadedModel, load_model
from tests.tiny import (
    EOS_TOKEN_ID,
    MAX_MODEL_LEN,
    PAD_TOKEN_ID,
    TINY,
    VOCAB_SIZE,
    llama_twin,
    tiny_exaone3,
    tiny_exaone4,
    tiny_exaone35,
    tiny_exaone35_tied,
    tiny_gemma2,
    tiny_llama,
)

EXAONE3_KINDS = [tiny_exaone3, tiny_exaone35, tiny_exaone35_tied]


class _NoTerminal:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"stdin.{name} was used")


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks on the terminal fails its test."""

    def refuse(*_: object) -> Any:
        raise AssertionError("something asked a question on the terminal")

    monkeypatch.setattr(sys, "stdin", _NoTerminal())
    monkeypatch.setattr(builtins, "input", refuse)


def load(directory: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(directory, dtype=dtype, device="cpu")


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def left_padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A batch of random rows, padded on the left, with position ids as generation makes them."""
    generator = torch.Generator().manual_seed(7)
    width = max(lengths)
    ids = torch.randint(4, VOCAB_SIZE - 1, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(**batch).logits
    return result


@pytest.mark.parametrize("write", EXAONE3_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[23], [3, 300, 17]], ids=["plain", "left-padded"])
def test_exaone_3_computes_exactly_what_llama_computes_with_its_weights(
    tmp_path: Path, write: Callable[[Path], Path], dtype: str, lengths: list[int]
) -> None:
    directory = write(tmp_path / "exaone")
    twin_model: Any = LlamaForCausalLM.from_pretrained(
        llama_twin(directory, tmp_path / "llama"), dtype=getattr(torch, dtype)
    )
    twin = logits(twin_model, left_padded(lengths))
    ours = logits(load(directory, dtype).model, left_padded(lengths))
    assert twin.float().std() > 0.1
    assert (ours - twin).abs().max().item() == 0.0


def test_exaone_3_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    one = load(tiny_exaone3(tmp_path / "one")).model
    three = load(tiny_exaone3(tmp_path / "three", num_weight_files=3)).model
    assert torch.equal(logits(one, left_padded([9, 4])), logits(three, left_padded([9, 4])))


@pytest.mark.parametrize("family", TINY)
def test_every_family_loads_whole_and_runs(tmp_path: Path, family: str) -> None:
    directory = TINY[family](tmp_path)
    loaded = load(directory)
    assert logits(loaded.model, left_padded([5, 12])).shape == (2, 12, VOCAB_SIZE)
    assert loaded.model_type == json.loads((directory / "config.json").read_text())["model_type"]
    assert loaded.architecture == type(loaded.model).__name__
    assert (loaded.eos_token_ids, loaded.pad_token_id) == ((EOS_TOKEN_ID,), PAD_TOKEN_ID)
    assert (loaded.vocab_size, loaded.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


@pytest.mark.parametrize("family", TINY)
def test_no_family_lets_padding_change_a_row(tmp_path: Path, family: str) -> None:
    model = load(TINY[family](tmp_path)).model
    batch = left_padded([6, 25])
    alone = {name: value[:1, -6:] for name, value in batch.items()}
    assert torch.allclose(logits(model, batch)[0, -6:], logits(model, alone)[0], atol=1e-4)


@pytest.mark.parametrize("family", ["exaone35", "exaone4", "llama", "gemma2"])
def test_bfloat16_leaves_the_rotary_frequencies_in_float32(tmp_path: Path, family: str) -> None:
    model = load(TINY[family](tmp_path), "bfloat16").model
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    assert {buffer.dtype for buffer in frequencies.values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    exact = dict(load(TINY[family](tmp_path), "float32").model.named_buffers())
    assert all(torch.equal(buffer, exact[name]) for name, buffer in frequencies.items())


def test_the_dtype_in_the_checkpoint_is_ignored(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path)
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"
    assert load(directory, "float16").model.lm_head.weight.dtype == torch.float16


def test_capped_attention_is_computed_by_an_implementation_that_caps(tmp_path: Path) -> None:
    assert load(tiny_gemma2(tmp_path / "gemma2")).model.config._attn_implementation == "eager"
    assert load(tiny_llama(tmp_path / "llama")).model.config._attn_implementation == "sdpa"


def test_the_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model: Any = load(tiny_exaone35_tied(tmp_path)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_that_is_stored_and_differs_is_not_tied(tmp_path: Path) -> None:
    path = tiny_exaone35_tied(tmp_path) / "model.safetensors"
    weights = load_file(path)
    head = weights["transformer.wte.weight"] * 2
    save_file(weights | {"lm_head.weight": head}, path, {"format": "pt"})
    model: Any = load(tmp_path).model
    assert torch.equal(model.lm_head.weight, head)


def test_all_end_of_sequence_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 7]}))
    assert load(tmp_path).eos_token_ids == (7, 9)


def test_without_a_generation_config_they_come_from_the_config(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).eos_token_ids == (EOS_TOKEN_ID,)


def test_a_model_that_names_no_special_ids_has_no_end_and_pads_with_zero(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(tmp_path, eos_token_id=None, pad_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    loaded = load(tmp_path)
    assert (loaded.eos_token_ids, loaded.pad_token_id) == ((), 0)


def test_a_missing_pad_id_is_replaced_by_an_end_of_sequence_id(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(tmp_path, pad_token_id=None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": -1}))
    assert load(tmp_path).pad_token_id == 7


def test_a_shorter_context_may_be_asked_for_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path)
    assert load_model(directory, dtype="float32", device="cpu", max_model_len=64).max_model_len == 64
    with pytest.raises(ModelError, match=r"longer than the model's limit of 512"):
        load_model(directory, dtype="float32", device="cpu", max_model_len=4096)


def test_an_unknown_family_with_its_own_code_is_refused_without_a_question(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(
        tmp_path, model_type="unheard_of", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    with pytest.raises(ModelError, match=r"does not know model_type unheard_of and its own code \(auto_map\) is never"):
        load(tmp_path)


def test_a_known_family_with_its_own_code_runs_transformers_code(tmp_path: Path) -> None:
    tiny_exaone4(tmp_path)
    change_config(tmp_path, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    assert type(load(tmp_path).model).__module__.startswith("transformers.")


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(tmp_path, model_type="vit")
    with pytest.raises(ModelError, match="vit is not a causal language model"):
        load(tmp_path)


def test_the_vision_model_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(tmp_path, model_type="exaone4_5")
    with pytest.raises(ModelError, match="only text models are supported"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
            r"1 missing: model\.layers\.1\.mlp\.up_proj",
        ),
        (lambda weights: weights.update(strange=torch.ones(2)), "1 unexpected: strange"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), r"1 of another shape: .*model\.norm"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_for_every_family(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    path = tiny_llama(tmp_path) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=complaint):
        load(tmp_path)


def test_exaone_weights_that_do_not_fit_are_refused_before_transformers_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_exaone3(tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.ln_f.weight"]
    save_file(weights, path, {"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(ModelError, match=r"1 missing: transformer\.ln_f\.weight"):
        load(tmp_path)


def test_a_forgotten_mapping_would_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.models.loading.KEY_MAPPING", {})
    with pytest.raises(ModelError, match=r"20 missing: .*20 unexpected: .*random numbers"):
        load(tiny_exaone3(tmp_path))


def test_a_configuration_transformers_cannot_use_is_refused_by_directory(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change_config(tmp_path, hidden_size="wide")
    with pytest.raises(ModelError, match="transformers cannot load the model"):
        load(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles only"):
        load(tmp_path)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype int8: must be one of bfloat16, float16, float32"):
        load(tmp_path, "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torch sees no GPU here; set model\.device=cpu"):
        load_model(tmp_path, dtype="bfloat16", device="cuda")


def test_a_device_without_room_is_refused_with_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", no_room)
    with pytest.raises(ModelError, match=r"weights take 0\.0 GB and do not fit"):
        load(tiny_exaone3(tmp_path))


def test_the_twin_is_what_auto_classes_load(tmp_path: Path) -> None:
    twin: Any = AutoModelForCausalLM.from_pretrained(llama_twin(tiny_exaone3(tmp_path / "a"), tmp_path / "b"))
    assert isinstance(twin, LlamaForCausalLM)


def test_tiny_checkpoints_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for family, write in TINY.items():
        one, two = (load_file(write(tmp_path / family / name) / "model.safetensors") for name in ("a", "b"))
        assert all(torch.equal(one[name], two[name]) for name in one), family
