"""An OpenAI batch file through a whole job and back: every line answered or refused, once, in the API's own forms."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

import batchinfer
from batchinfer.spec import JobSpec
from tests.jobs import command, fake_job, model_without_weights, prompts, read_dead_letters

pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).parents[2]
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"


def batch_lines() -> list[dict[str, Any]]:
    """Forty requests to both endpoints: a few too long for a short context, a few that no run can answer."""
    lines = []
    for number, prompt in enumerate(prompts(40)):
        body: dict[str, Any] = {"model": "my-model", "max_tokens": 6, "seed": number}
        if number % 3 == 0:
            url = TEXT_URL
            body |= {"prompt": prompt, "logprobs": 1}
        else:
            url = CHAT_URL
            body |= {"messages": [{"role": "user", "content": prompt}], "n": 1 + number % 2}
        if number % 10 == 7:
            body["tools"] = [{"type": "function", "function": {"name": "f"}}]
        lines.append({"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def exported(output: Path, target: Path, expected: int) -> list[dict[str, Any]]:
    """All lines of both files, each accepted by the client's types, after an export that ends with this code."""
    ended = command("export", output, target, "--format", "openai-batch")
    assert ended.exit_code == expected, ended.output
    lines: list[dict[str, Any]] = []
    for name in ("output.jsonl", "errors.jsonl"):
        lines += [json.loads(text) for text in (target / name).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["response"]["status_code"] == 200:
            body = line["response"]["body"]
            is_chat = body["object"] == "chat.completion"
            (ChatCompletion if is_chat else TextCompletion).model_validate(body, strict=True)
    return lines


def job(model: Path, rows: Path, output: Path, /, **blocks: Any) -> JobSpec:
    return fake_job(
        model, rows, output,
        prompt={"text": None, "request": "body"}, sampling={"max_new_tokens": None}, execution={"rows_per_unit": 9},
        **blocks,
    )  # fmt: skip


def test_a_batch_file_comes_back_as_output_and_error_files(tmp_path: Path) -> None:
    """1. a run with a short context  2. a part is lost, and run again  3. dead letters are tried with a longer one."""
    model = model_without_weights(tmp_path / "model")
    asked = batch_lines()
    rows = write_lines(tmp_path / "in" / "batch.jsonl", asked)
    output = tmp_path / "out"
    short = job(model, rows, output, model={"max_model_len": 44})
    batchinfer.run(short)
    kinds = [kind for _, kind in read_dead_letters(output)]
    assert kinds.count("unsupported_field") == 4
    assert kinds.count("too_long") > 3
    assert batchinfer.verify_deep(str(output)).findings == ()
    lines = exported(output, tmp_path / "first", 1)
    assert sorted(line["custom_id"] for line in lines) == sorted(line["custom_id"] for line in asked)

    next(iter(sorted((output / "completions").iterdir()))).unlink()
    assert len(exported(output, tmp_path / "partial", 3)) == len(asked) - 9
    batchinfer.run(short)
    assert exported(output, tmp_path / "again", 1) == lines

    batchinfer.retry_failed(job(model, rows, output))
    assert {kind for _, kind in read_dead_letters(output)} == {"unsupported_field"}
    lines = exported(output, tmp_path / "second", 1)
    by_id = {line["custom_id"]: line["response"] for line in lines}
    assert [line["custom_id"] for line in lines[:36]] == [it["custom_id"] for it in asked if "tools" not in it["body"]]
    for line in asked:
        body, response = line["body"], by_id[line["custom_id"]]
        if "tools" in body:
            assert response["body"]["error"]["param"] == "tools"
            continue
        choices = response["body"]["choices"]
        assert response["body"]["model"] == "my-model"
        assert len(choices) == body.get("n", 1)
        assert response["body"]["usage"]["completion_tokens"] <= 6 * len(choices)
        assert (choices[0]["logprobs"] is not None) == ("logprobs" in body)


def test_the_ready_job_answers_its_own_requests(tmp_path: Path, exaone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    overrides = [f"model.path={exaone}", "engine.kind=fake", "cluster.num_cpus=1", f"output.path={output}"]
    ended = command("run", "jobs/openai-batch.yaml", *(part for each in overrides for part in ("--set", each)))
    assert ended.exit_code == 0, ended.output
    lines = exported(output, tmp_path / "results", 0)
    asked = [json.loads(text) for text in Path("jobs/requests/batch.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in asked]
