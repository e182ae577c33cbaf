import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import ModelError
from batchinfer.models.tokenizer import load_tokenizer
from tests.tiny import EOS_TOKEN_ID, PAD_TOKEN_ID, TINY, VOCAB_SIZE, tiny_exaone3, tiny_exaone4, tiny_llama

TEXTS = ["Hello the world", "안녕하세요, 반갑습니다!", "日本 🎉 \t\n x", "1234567890 ½ ²", "<|user|>[|user|]"]
MESSAGES = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks on the terminal fails its test."""

    def refuse(*_: object) -> Any:
        pytest.fail("something asked a question on the terminal")

    monkeypatch.setattr(builtins, "input", refuse)


@pytest.mark.parametrize("family", TINY)
def test_any_text_survives_encoding_and_decoding(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(TINY[family](tmp_path))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_TOKEN_ID, PAD_TOKEN_ID)


@pytest.mark.parametrize("family", ["exaone3", "exaone35", "exaone4", "exaone_moe"])
def test_exaones_tokenizer_json_is_used_verbatim(tmp_path: Path, family: str) -> None:
    directory = TINY[family](tmp_path)
    tokenizer: Any = load_tokenizer(directory)
    written = json.loads((directory / "tokenizer.json").read_text())
    in_use = json.loads(tokenizer.backend_tokenizer.to_str())
    assert in_use["pre_tokenizer"] == written["pre_tokenizer"]
    assert in_use["model"]["merges"] == written["model"]["merges"]


def test_only_the_end_of_turn_is_special(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_exaone3(tmp_path))
    assert tokenizer.encode("[|endofturn|]", add_special_tokens=False) == [EOS_TOKEN_ID]
    assert len(tokenizer.encode("[|user|]", add_special_tokens=False)) == 5


def test_exaone_adds_no_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_exaone3(tmp_path))
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False)


def test_the_chat_template_of_exaone_3(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_exaone3(tmp_path))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == (
        "[|system|]SYS[|endofturn|]\n[|user|]Hi\n[|assistant|]"
    )
    assert tokenizer.apply_chat_template(MESSAGES[1:], tokenize=False, add_generation_prompt=True) == (
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"
    )


def test_the_chat_template_of_exaone_4(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_exaone4(tmp_path))
    rendered = "[|system|]\nSYS[|endofturn|]\n[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == (
        rendered + "\n</think>\n\n"
    )
    assert rendered == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


def test_a_checkpoint_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tiny_exaone3(tmp_path / "3", chat_template=None)).chat_template is None
    assert load_tokenizer(tiny_exaone4(tmp_path / "4", chat_template=None)).chat_template is None


def test_a_missing_tokenizer_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer \(tokenizer\.json\).*prompt\.token_ids"):
        load_tokenizer(tiny_exaone3(tmp_path, with_tokenizer=False))


@pytest.mark.parametrize("write", [tiny_exaone3, tiny_llama])
def test_a_broken_tokenizer_is_refused_by_directory(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_needs_the_checkpoints_code_is_refused_without_a_question(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.Own", "code.OwnFast"]}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_loading_exaones_tokenizer_imports_no_torch(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    code = (
        "import sys; from pathlib import Path; from batchinfer.models.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)
