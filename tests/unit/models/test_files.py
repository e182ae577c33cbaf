import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer.errors import ModelError
from batchinfer.models.files import (
    check_model_files,
    check_weight_names,
    max_model_len,
    read_config,
    read_generation_config,
    weight_files,
)
from batchinfer.models.safetensors_header import read_safetensors_header
from tests.tiny import TINY, VOCAB_SIZE, tiny_exaone3, tiny_exaone35_tied


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", TINY)
def test_a_whole_directory_of_every_family_passes(tmp_path: Path, family: str) -> None:
    check_model_files(TINY[family](tmp_path), needs_tokenizer=True)


def test_a_sharded_directory_passes_and_lists_its_files(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path, num_weight_files=3)
    check_model_files(tmp_path, needs_tokenizer=True)
    assert [path.name for path in weight_files(tmp_path)] == [
        f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)
    ]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such directory; check model\.path"):
        check_model_files(tmp_path / "nowhere", needs_tokenizer=False)


def test_no_config_is_refused(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json; model\.path must name a directory in hub layout"):
        check_model_files(tmp_path, needs_tokenizer=False)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    tiny_exaone3(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: .*copy or download it again"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_no_model_type_is_refused(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    change_config(tmp_path, model_type=None)
    with pytest.raises(ModelError, match='no "model_type"'):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_the_vision_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    change_config(tmp_path, model_type="exaone4_5")
    with pytest.raises(ModelError, match=r"exaone4_5: .*only text models.*use EXAONE 4\.0"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_an_adapter_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"PEFT adapter; merge it"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_no_weights_is_refused(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"no weights: neither .*\(found weights\.safetensors\)"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_pickles_only_are_refused_with_the_conversion(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickles only \(pytorch_model\.bin\).*never loaded") as refused:
        check_model_files(tmp_path, needs_tokenizer=False)
    assert "save_file" in str(refused.value)


def test_the_conversion_the_refusal_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_exaone35_tied(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # A tied head is the same storage under two names, as torch pickles it.
    torch.save(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError) as refused:
        check_model_files(tmp_path, needs_tokenizer=False)
    code = str(refused.value).split('python -c "')[1].rsplit('"', 1)[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    check_model_files(tmp_path, needs_tokenizer=False)


def test_missing_files_of_the_index_are_counted_and_named(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path, num_weight_files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_an_index_cannot_name_files_outside_the_directory(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path, num_weight_files=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ModelError, match=r"outside the directory: \.\./elsewhere"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_a_truncated_weight_file_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"1,000 bytes too short; copy or download it again"):
        check_model_files(tmp_path, needs_tokenizer=False)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 not safetensors", b"\x02\0\0\0\0\0\0\0[]", b"\x10" + b"\0" * 7 + b"{" * 16]
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_safetensors_header(path)


def test_tensor_places_are_offsets_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3, dtype=torch.int64), "b": torch.ones(2, 2)}, path)
    header = read_safetensors_header(path)
    content = path.read_bytes()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()} == {
        "a": ("I64", (3,)),
        "b": ("F32", (2, 2)),
    }
    assert content[header.tensors["a"].begin : header.tensors["a"].end] == torch.arange(3).numpy().tobytes()
    assert header.size_bytes == len(content)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.pop("transformer.h.1.ln_2.weight"))
    with pytest.raises(ModelError, match=r"1 missing: transformer\.h\.1\.ln_2\.weight"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.update({"model.extra.weight": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"1 unexpected: model\.extra\.weight"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    change_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelError, match=r"6 of another shape: .*c_fc_0\.weight is \[48, 32\], should be \[64, 32\]"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_names_of_llama_under_an_exaone_config_are_refused_and_only_a_few_listed(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"model.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"21 missing: .* and 18 more; 21 unexpected"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_a_tied_head_stored_twice_is_accepted_but_not_in_another_shape(tmp_path: Path) -> None:
    tiny_exaone35_tied(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(VOCAB_SIZE, 32)}))
    check_model_files(tmp_path, needs_tokenizer=False)
    rewrite_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(VOCAB_SIZE, 8)}))
    with pytest.raises(ModelError, match=r"1 of another shape: lm_head\.weight"):
        check_model_files(tmp_path, needs_tokenizer=False)


def test_a_quantised_exaone_3_is_refused(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match=r"quantised EXAONE 3\.x"):
        check_model_files(tmp_path, needs_tokenizer=False)


@pytest.mark.parametrize("family", ["exaone3", "exaone4", "llama"])
def test_a_missing_tokenizer_matters_only_where_one_is_needed(tmp_path: Path, family: str) -> None:
    directory = TINY[family](tmp_path)
    (directory / "tokenizer.json").unlink()
    check_model_files(directory, needs_tokenizer=False)
    with pytest.raises(ModelError, match=r"no tokenizer .*prompt\.token_ids"):
        check_model_files(directory, needs_tokenizer=True)


def test_hub_listings_are_judged_by_the_same_rule() -> None:
    check_weight_names(["config.json", "model.safetensors.index.json"], "org/model")
    with pytest.raises(ModelError, match=r"org/model: weights are pickles only"):
        check_weight_names(["config.json", "pytorch_model-00001-of-00002.bin"], "org/model")
    with pytest.raises(ModelError, match=r"org/model: no weights"):
        check_weight_names(["config.json"], "org/model")


def test_a_missing_generation_config_is_empty(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "exaone", "max_position_embeddings": 4096}, 4096),
        ({"model_type": "exaone"}, 2048),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 131072}}, 131072),
    ],
)
def test_the_models_own_limit_is_read(config: dict[str, object], limit: int) -> None:
    assert max_model_len(config) == limit


def test_a_shorter_limit_may_be_asked_for_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    config = read_config(tiny_exaone3(tmp_path))
    assert max_model_len(config, 100) == 100
    with pytest.raises(ModelError, match=r"max_model_len 513 is longer than the model's limit of 512"):
        max_model_len(config, 513)


def test_a_model_without_a_stated_limit_needs_one_from_the_job() -> None:
    assert max_model_len({"model_type": "bloom"}, 100) == 100
    with pytest.raises(ModelError, match=r"set model\.max_model_len"):
        max_model_len({"model_type": "bloom"})
