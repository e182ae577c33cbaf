"""Answers in the forms that benchmarks' judges read: the fields each of them looks at, in the questions' order."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchinfer.cli import main
from batchinfer.errors import OutputError
from batchinfer.export import Format, export
from batchinfer.export.judges import JUDGES
from batchinfer.export.judges.answered import AnsweredQuestion, Generator
from batchinfer.records import Answer, Completion
from batchinfer.storage.location import Location
from tests.unit.export.batches import CREATED_S, described, failed, said, write_output

BY = Generator("my-model", CREATED_S, "f" * 16, {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 7})


def question(row: dict[str, Any], *samples: tuple[str, ...]) -> AnsweredQuestion:
    return AnsweredQuestion("shard:0", row, samples, tuple(tuple(len(text) for text in turns) for turns in samples))


def answer(judge: str, asked: AnsweredQuestion) -> dict[str, Any]:
    return JUDGES[judge].answer(asked, BY)


def test_mt_bench_has_a_choice_per_sample_and_a_text_per_turn() -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["q1", "q2"]}
    found = answer("mt-bench", question(row, ("a1", "a2"), ("b1", "b2")))
    assert len(found.pop("answer_id")) == 22
    assert found == {
        "question_id": 81,
        "model_id": "my-model",
        "choices": [{"index": 0, "turns": ["a1", "a2"]}, {"index": 1, "turns": ["b1", "b2"]}],
        "tstamp": float(CREATED_S),
    }


def test_logickor_keeps_questions_and_references_beside_the_outputs() -> None:
    row = {"id": 1, "category": "추론(Reasoning)", "questions": ["q1", "q2"], "references": ["r1", None]}
    assert answer("logickor", question(row, ("a1", "a2"))) == {**row, "outputs": ["a1", "a2"]}


def test_arena_hard_follows_its_questions_version() -> None:
    old = {"question_id": "abc", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": "q"}]}
    found = answer("arena-hard", question(old, ("a1",)))
    assert len(found.pop("answer_id")) == 22
    assert found == {
        "question_id": "abc",
        "model_id": "my-model",
        "choices": [{"index": 0, "turns": [{"content": "a1", "token_len": 2}]}],
        "tstamp": float(CREATED_S),
    }
    text = "# A\n## B\n1. x\n- y\n* z\n**b** __c__\n```\n# no\n- no\n**no**\n```"
    new = {"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "q"}
    found = answer("arena-hard", question(new, (text,)))
    assert len(found.pop("ans_id")) == 22
    assert found == {
        "uid": "u1",
        "model": "my-model",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": text}}],
        "tstamp": float(CREATED_S),
        "metadata": {
            "token_len": len(text),
            "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 1, "unordered": 2},
            "bold_count": {"**": 1, "__": 1},
        },
    }


def test_wildbench_keeps_the_conversation_and_what_the_judge_scores_by() -> None:
    chat = [{"role": "user", "content": "q", "language": "English", "timestamp": None}]
    row = {"session_id": "s", "id": "s", "conversation_input": chat, "checklist": ["c"], "primary_tag": "Math"}
    found = answer("wildbench", question(row, ("a\n",)))
    assert found == {
        "session_id": "s",
        "chat_history": ["q"],
        "model_input": "n/a",
        "output": ["a"],
        "generator": "my-model",
        "configs": {
            "engine": "batchinfer",
            "repetition_penalty": None,
            "temperature": 0.0,
            "top_p": 1.0,
            "max_tokens": 7,
        },
        "dataset": "wild_bench_v2",
        "id": "s",
        "checklist": ["c"],
        "primary_tag": "Math",
    }


def test_alpaca_eval_has_instruction_output_and_generator() -> None:
    row = {"dataset": "helpful_base", "instruction": "q", "output": "theirs", "generator": "text_davinci_003"}
    assert answer("alpaca-eval", question(row, ("a",))) == {
        "dataset": "helpful_base",
        "instruction": "q",
        "output": "a",
        "generator": "my-model",
    }


# Whole files ---------------------------------------------------------------------------------------------------------


def conversation(*answers: str) -> list[Completion]:
    told = tuple(Answer(text, "stop", 5, len(text)) for text in answers)
    return [Completion("", 0, answers[-1], (1, 2), "stop", 9, None, None, told)]


def two_turns(tmp_path: Path, **job: Any) -> Location:
    rows = [
        {"question_id": number, "category": "math", "turns": [f"q{number}", "and?"], "id": number}
        | {"questions": [f"q{number}", "and?"], "references": [None, "r"]}
        for number in range(5)
    ]
    made = {number: conversation(f"a{number}", f"b{number}") for number in (0, 1, 2, 4)}
    output, _ = write_output(
        tmp_path, rows, {**made, 3: failed("too_long", "x")}, columns=list(rows[0]), job=described(None, **job),
        answers=True,
    )  # fmt: skip
    return output


def test_one_line_per_answered_question_in_their_order(tmp_path: Path) -> None:
    output = two_turns(tmp_path)
    result = export(str(output), str(tmp_path / "a"), "mt-bench")
    assert (result.num_completions, result.num_files, result.exit_code) == (4, 1, 1)
    lines = [json.loads(text) for text in (tmp_path / "a" / "Some-Model.jsonl").read_text().splitlines()]
    assert [found["question_id"] for found in lines] == [0, 1, 2, 4]
    assert lines[1]["choices"] == [{"index": 0, "turns": ["a1", "b1"]}]
    assert len({found["answer_id"] for found in lines}) == 4
    export(str(output), str(tmp_path / "b"), "logickor", generator="LG AI/My Model")
    lines = [
        json.loads(text) for text in (tmp_path / "b" / "LG_AI_My_Model" / "default.jsonl").read_text().splitlines()
    ]
    assert lines[0]["outputs"] == ["a0", "b0"]
    assert lines[0]["references"] == [None, "r"]


def test_arrays_are_whole_json(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "dataset": "x"} for number in range(5)]
    output, _ = write_output(
        tmp_path, rows, {number: said(f"a{number}") for number in range(5)}, columns=["instruction", "dataset"],
        job=described(None),
    )  # fmt: skip
    export(str(output), str(tmp_path / "a"), "alpaca-eval", generator="me")
    found = json.loads((tmp_path / "a" / "model_outputs.json").read_text())
    assert [(item["instruction"], item["output"], item["generator"]) for item in found] == [
        (f"q{number}", f"a{number}", "me") for number in range(5)
    ]


def test_an_array_without_answers_is_empty(tmp_path: Path) -> None:
    output, _ = write_output(
        tmp_path, [{"instruction": "q"}], {0: failed("too_long", "x")}, columns=["instruction"], job=described(None)
    )
    export(str(output), str(tmp_path / "a"), "alpaca-eval")
    assert json.loads((tmp_path / "a" / "model_outputs.json").read_text()) == []


@pytest.mark.parametrize("format_", ["mt-bench", "logickor", "arena-hard", "wildbench", "alpaca-eval"])
def test_a_column_that_was_not_passed_through_is_named(tmp_path: Path, format_: Format) -> None:
    output, _ = write_output(tmp_path, [{"other": "q"}], {0: said("a")}, columns=["other"], job=described(None))
    with pytest.raises(OutputError, match=r"the judge needs it; the output has other\. Name it in output\.columns"):
        export(str(output), str(tmp_path / "a"), format_)
    assert not (tmp_path / "a").exists()


def test_the_command_takes_a_generator(tmp_path: Path) -> None:
    output = two_turns(tmp_path)
    arguments = ["export", str(output), str(tmp_path / "a"), "--format", "mt-bench", "--generator", "my-model"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "4 completions in 1 files" in result.stdout
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["my-model.jsonl"]
    result = CliRunner().invoke(main, [*arguments[:-1], "...", "--overwrite"])
    assert result.exit_code == 2
    assert "makes no file name" in result.stderr
