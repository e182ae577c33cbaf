"""A checkpoint made to harm: nothing in it is run, nothing in it exhausts the machine, and each refusal says why."""

import builtins
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import ModelError
from batchinfer.models.files import check_model_files
from batchinfer.models.identity import directory_identity
from batchinfer.models.loading import load_model
from batchinfer.models.safetensors_header import read_safetensors_header
from batchinfer.models.tokenizer import load_tokenizer
from tests.tiny import TINY, tiny_exaone3, tiny_llama


class Trap:
    """Unpickled, it writes the witness."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self._witness),)


def change(path: Path, **values: object) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def set_traps(directory: Path, witness: Path) -> None:
    """Everything in a checkpoint that some library would run, or ask whether it may."""
    code = f"import os\nos.mkdir({str(witness)!r})\nclass Own: pass\nOwnFast = OwnConfig = OwnModel = Own\n"
    for name in (
        "code.py",
        "tokenization_own.py",
        "modeling_own.py",
        "configuration_own.py",
        "__init__.py",
        "setup.py",
    ):
        (directory / name).write_text(code)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code)
    (directory / "custom_generate" / "requirements.txt").write_text("no-such-package-as-this")
    own = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    change(
        directory / "config.json",
        auto_map={**own, "AutoTokenizer": ["code.Own", "code.OwnFast"]},
        custom_generate="code.Own",
        custom_pipelines={"text-generation": {"impl": "code.Own", "pt": ["OwnModel"]}},
        attn_implementation="no-such-org/kernel",
        _attn_implementation="no-such-org/kernel",
        trust_remote_code=True,
    )
    change(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.OwnFast"]},
        trust_remote_code=True,
    )
    change(directory / "generation_config.json", custom_generate="code.Own", trust_remote_code=True)
    change(directory / "processor_config.json", auto_map={"AutoProcessor": "code.Own"})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "evil.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    trap = pickle.dumps(Trap(witness))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "model.ckpt", "x.pth"):
        (directory / name).write_bytes(trap)


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        pytest.fail("something asked a question on the terminal")

    monkeypatch.setattr(builtins, "input", refuse)


@pytest.mark.parametrize("family", ["exaone3", "exaone4", "llama", "qwen2", "gemma2"])
def test_no_code_of_a_checkpoint_runs_and_no_pickle_is_opened(tmp_path: Path, family: str) -> None:
    directory, witness = TINY[family](tmp_path / "model"), tmp_path / "witness"
    set_traps(directory, witness)
    check_model_files(directory, needs_tokenizer=True)
    directory_identity(directory)
    tokenizer = load_tokenizer(directory)
    assert "own" not in type(tokenizer).__module__
    loaded = load_model(directory, dtype="float32", device="cpu")
    assert type(loaded.model).__module__.startswith("transformers.models.")
    assert loaded.model.config._attn_implementation in ("sdpa", "eager")
    assert not witness.exists()


def test_the_traps_are_traps(tmp_path: Path) -> None:
    directory, witness = tiny_llama(tmp_path / "model"), tmp_path / "witness"
    set_traps(directory, witness)
    pickle.loads((directory / "pytorch_model.bin").read_bytes())
    assert witness.is_dir()


def test_an_index_of_pickles_is_refused_before_one_is_opened(tmp_path: Path) -> None:
    directory, witness = tiny_exaone3(tmp_path / "model", num_weight_files=2), tmp_path / "witness"
    set_traps(directory, witness)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(ModelError, match=r"names files that are not safetensors: pytorch_model\.bin"):
        load_model(directory, dtype="float32", device="cpu")
    (directory / "pytorch_model.bin").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(directory, dtype="float32", device="cpu")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("family", ["exaone3", "llama"])
def test_deeply_nested_json_is_a_broken_file(tmp_path: Path, family: str, name: str) -> None:
    directory = TINY[family](tmp_path)
    (directory / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)

    def load() -> None:
        load_tokenizer(directory)
        load_model(directory, dtype="float32", device="cpu")

    with pytest.raises(ModelError):
        load()


def test_a_configuration_of_another_order_is_refused(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text() + " " * (64 * 2**20))
    with pytest.raises(ModelError, match=r"larger than 67,108,864 bytes"):
        check_model_files(tmp_path, needs_tokenizer=False)


@pytest.mark.parametrize("family", ["exaone3", "exaone4", "llama"])
@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9, "num_layers": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 10**12},
        {"head_dim": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"vocab_size": 1e300},
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(tmp_path: Path, family: str, values: dict[str, object]) -> None:
    directory = TINY[family](tmp_path)
    change(directory / "config.json", **values)
    with pytest.raises(ModelError, match=r"config\.json: \w+ is above [\d,]+, which no model has"):
        load_model(directory, dtype="float32", device="cpu")


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**63),
        header(b"{}", 2**64 - 1),
        header(b"{}", 99_000_000),
        header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-8,4]}}') + b"\0" * 8,
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}') + b"\0" * 8,
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + b"\0" * 8,
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}"),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999]}}'),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_safetensors_header(path)


def test_a_tokenizer_that_names_files_elsewhere_reads_none_of_them(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "model")
    (tmp_path / "elsewhere.jinja").write_text("secret words")
    change(directory / "tokenizer_config.json", chat_template_file="../elsewhere.jinja", vocab_file="/etc/passwd")
    tokenizer = load_tokenizer(directory)
    assert "secret" not in str(tokenizer.chat_template)
    assert "root" not in tokenizer.get_vocab()
