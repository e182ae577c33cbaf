"""The benchmarks' job files of ``jobs/bench`` on a few questions of our own, in exactly the form of the published ones.

Each runs as it lies there, with the fake engine's words; driver and replica are threads of this process.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify_deep
from batchinfer.export import Format, export
from batchinfer.job_file import load_job
from tests.faults.in_process import one_machine, run_quietly
from tests.jobs import model_without_weights

BENCH = Path(__file__).parents[2] / "jobs" / "bench"
FIRST, SECOND = "Name a river in Korea.", "And how long is it?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Room for two answers of the longest kind.
    return model_without_weights(tmp_path_factory.mktemp("model"), limit=16_384)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def finished(name: str, rows: Path, model: Path, tmp_path: Path) -> Path:
    """The output of a job file on these questions, all of them answered."""
    output = tmp_path / "out"
    overrides = {"input.path": rows, "model.path": model, "output.path": output, "engine.kind": "fake"}
    spec = load_job(BENCH / f"{name}.yaml", [f"{key}={value}" for key, value in overrides.items()], environment={})
    with one_machine():
        result, _ = run_quietly(spec)
    assert result.outcome == "complete"
    assert verify_deep(str(output)).findings == ()
    return output


def exported(output: Path, target: Path, format_: Format, file_name: str) -> list[dict[str, Any]]:
    """The answers as the judge would read them."""
    export(str(output), str(target), format_, generator="my-model")
    text = (target / file_name).read_text(encoding="utf-8")
    found: list[dict[str, Any]] = (
        json.loads(text) if file_name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    )
    return found


def test_every_benchmark_has_its_test() -> None:
    tested = {"mt-bench", "komt-bench", "logickor", "arena-hard", "arena-hard-v2", "wildbench", "alpaca-eval"}
    assert {path.stem for path in BENCH.iterdir()} == tested
    assert all(load_job(path, environment={}).name == path.stem for path in BENCH.iterdir())


@pytest.mark.parametrize("name", ["mt-bench", "komt-bench"])
def test_mt_bench(tmp_path: Path, model: Path, name: str) -> None:
    rows = lines(
        tmp_path / "question.jsonl",
        {"question_id": 81, "category": "writing", "turns": [FIRST, SECOND]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["2", "4"]},
        {"question_id": 160, "category": "humanities", "turns": ["한강은 어디에 있나요?", "얼마나 길어요?"]},
        {"question_id": 161, "category": "riddles", "turns": [FIRST, SECOND]},
    )
    output = finished(name, rows, model, tmp_path)
    found = exported(output, tmp_path / "answers", "mt-bench", "my-model.jsonl")
    assert [set(line) for line in found] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 4
    assert [line["question_id"] for line in found] == [81, 111, 160, 161]
    for line in found:
        ((index, turns),) = [(choice["index"], choice["turns"]) for choice in line["choices"]]
        assert (index, len(turns), line["model_id"]) == (0, 2, "my-model")
        assert all(isinstance(text, str) and text for text in turns)


def test_logickor(tmp_path: Path, model: Path) -> None:
    rows = lines(
        tmp_path / "questions.jsonl",
        {"id": 1, "category": "추론(Reasoning)", "questions": ["가?", "나?"], "references": ["가", None]},
        {"id": 2, "category": "글쓰기(Writing)", "questions": [FIRST, SECOND], "references": [None, None]},
    )
    output = finished("logickor", rows, model, tmp_path)
    found = exported(output, tmp_path / "generated", "logickor", "my-model/default.jsonl")
    assert [list(line) for line in found] == [["id", "category", "questions", "outputs", "references"]] * 2
    assert [(line["id"], line["references"]) for line in found] == [(1, ["가", None]), (2, [None, None])]
    assert all(len(line["outputs"]) == 2 for line in found)


def test_arena_hard(tmp_path: Path, model: Path) -> None:
    old = {"category": "arena-hard-v0.1", "cluster": "Rivers", "turns": [{"content": FIRST}]}
    rows = lines(tmp_path / "old.jsonl", *({"question_id": name * 32, **old} for name in "ab"))
    found = exported(
        finished("arena-hard", rows, model, tmp_path / "old"), tmp_path / "a", "arena-hard", "my-model.jsonl"
    )
    assert [line["question_id"] for line in found] == ["a" * 32, "b" * 32]
    (turn,) = found[0]["choices"][0]["turns"]
    assert set(turn) == {"content", "token_len"}
    assert turn["token_len"] > 0

    new = {"category": "hard_prompt", "subcategory": "coding", "prompt": FIRST}
    rows = lines(tmp_path / "new.jsonl", *({"uid": name * 16, **new} for name in "ab"))
    found = exported(
        finished("arena-hard-v2", rows, model, tmp_path / "new"), tmp_path / "b", "arena-hard", "my-model.jsonl"
    )
    assert [line["uid"] for line in found] == ["a" * 16, "b" * 16]
    assert [message["role"] for message in found[0]["messages"]] == ["user", "assistant"]
    assert found[0]["messages"][0]["content"] == FIRST
    assert found[0]["messages"][1]["content"]["answer"]


def test_wildbench(tmp_path: Path, model: Path) -> None:
    def message(role: str, content: str) -> dict[str, Any]:
        moment = datetime(2024, 1, 1, tzinfo=UTC)
        return {"content": content, "language": "English", "redacted": False, "role": role, "timestamp": moment}

    chats = [
        [message("user", FIRST)],
        [message("user", FIRST), message("assistant", "The Han."), message("user", SECOND)],
    ]
    table = pa.Table.from_pylist(
        [
            {
                "id": f"w{number}", "session_id": f"s{number}", "conversation_input": chat,
                "references": {"gpt-4": "x"}, "length": 3, "checklist": ["Is it a river?"], "intent": "ask",
                "primary_tag": "Information seeking", "secondary_tags": ["Reasoning"],
            }
            for number, chat in enumerate(chats)
        ]
    )  # fmt: skip
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    output = finished("wildbench", tmp_path / "test-00000-of-00001.parquet", model, tmp_path)
    found = exported(output, tmp_path / "answers", "wildbench", "my-model.json")
    assert [item["session_id"] for item in found] == ["s0", "s1"]
    assert [len(item["chat_history"]) for item in found] == [1, 3]
    assert all(isinstance(item["output"], list) and item["output"][0] for item in found)
    assert found[1]["checklist"] == ["Is it a river?"]
    assert {item["generator"] for item in found} == {"my-model"}


def test_alpaca_eval(tmp_path: Path, model: Path) -> None:
    """The set is one JSON array; the job file says how to make lines of it."""
    baseline = {"dataset": "helpful_base", "output": "theirs", "generator": "text_davinci_003"}
    array = tmp_path / "alpaca_eval.json"
    array.write_text(json.dumps([{"instruction": text, **baseline} for text in (FIRST, SECOND)]))
    rows = lines(tmp_path / "alpaca_eval.jsonl", *json.loads(array.read_text()))
    output = finished("alpaca-eval", rows, model, tmp_path)
    found = exported(output, tmp_path / "answers", "alpaca-eval", "model_outputs.json")
    assert [set(item) for item in found] == [{"dataset", "instruction", "output", "generator"}] * 2
    assert [item["instruction"] for item in found] == [FIRST, SECOND]
    assert all(item["output"] not in ("", "theirs") for item in found)
