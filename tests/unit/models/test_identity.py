import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchinfer.errors import ModelError
from batchinfer.models.identity import directory_identity
from tests.tiny import tiny_exaone3


def test_a_moved_directory_is_the_same_model(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path / "a")
    before = directory_identity(directory)
    shutil.copytree(directory, tmp_path / "b")
    shutil.rmtree(directory)
    assert directory_identity(tmp_path / "b") == before


def test_it_is_flat_readable_text_and_holds_no_path(tmp_path: Path) -> None:
    identity = directory_identity(tiny_exaone3(tmp_path / "secret-place"))
    assert list(identity) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights",
    ]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in identity.values())


def test_other_weights_of_the_same_shapes_are_another_model(tmp_path: Path) -> None:
    one = directory_identity(tiny_exaone3(tmp_path / "a", seed=0))
    two = directory_identity(tiny_exaone3(tmp_path / "b", seed=1))
    assert one["weights"] != two["weights"]
    assert one["config.json"] == two["config.json"]


def test_a_change_to_any_single_tensor_is_seen(tmp_path: Path) -> None:
    path = tiny_exaone3(tmp_path) / "model.safetensors"
    seen = {directory_identity(tmp_path)["weights"]}
    weights = load_file(path)
    for name in weights:
        save_file({**weights, name: weights[name] + torch.full_like(weights[name], 1e-3)}, path, {"format": "pt"})
        seen.add(directory_identity(tmp_path)["weights"])
    assert len(seen) == 1 + len(weights)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_each_small_file_counts_under_its_own_name(tmp_path: Path, name: str) -> None:
    before = directory_identity(tiny_exaone3(tmp_path))
    (tmp_path / name).write_text((tmp_path / name).read_text() + " ")
    after = directory_identity(tmp_path)
    assert {key for key in before if before[key] != after[key]} == {name}


def test_files_that_do_not_matter_do_not_count(tmp_path: Path) -> None:
    before = directory_identity(tiny_exaone3(tmp_path))
    (tmp_path / "README.md").write_text("a model")
    assert directory_identity(tmp_path) == before


def test_a_directory_without_weights_has_no_identity(tmp_path: Path) -> None:
    (tiny_exaone3(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        directory_identity(tmp_path)
