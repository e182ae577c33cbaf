"""A batch's results: accepted by the API's own client types, one line per row over both files, in the input's order."""

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from openai import BaseModel
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from batchinfer.cli import main
from batchinfer.errors import OutputError
from batchinfer.export import FORMATS, ExportResult, export
from batchinfer.export.token_texts import load_token_texts
from batchinfer.records import TokenLogprobs
from batchinfer.storage.layout import errors_part
from batchinfer.storage.location import Location
from tests.tiny import write_tokenizer
from tests.unit.export.batches import CHAT, CREATED_S, TEXT, described, failed, line, said, write_output

TEXT_URL = "/v1/completions"


def exported(output: Location, target: Path, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Lines of both files, and the exit code."""
    result = export(str(output), str(target), "openai-batch", **options)
    assert isinstance(result, ExportResult)
    assert sorted(path.name for path in target.iterdir()) == ["errors.jsonl", "output.jsonl"]
    files = ((target / name).read_text(encoding="utf-8").splitlines() for name in ("output.jsonl", "errors.jsonl"))
    outputs, errors = ([json.loads(text) for text in lines] for lines in files)
    return outputs, errors, result.exit_code


def known(value: object) -> None:
    """The client's types let unknown fields pass; here none may be there."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, value.model_extra
        for name in type(value).model_fields:
            known(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            known(item)


def accepted(found: dict[str, Any]) -> ChatCompletion | TextCompletion:
    """A line of output.jsonl as the client reads it."""
    assert set(found) == {"id", "custom_id", "response", "error"}
    assert set(found["response"]) == {"status_code", "request_id", "body"}
    assert (found["response"]["status_code"], found["error"]) == (200, None)
    body = found["response"]["body"]
    kind = ChatCompletion if body["object"] == "chat.completion" else TextCompletion
    read = kind.model_validate(body, strict=True)
    known(read)
    assert json.loads(read.model_dump_json(exclude_unset=True)) == body
    return read


def test_chats_and_texts_are_what_the_client_expects(tmp_path: Path) -> None:
    rows = [line("a", {**CHAT, "n": 2}), line("b", TEXT, TEXT_URL), line("c", CHAT)]
    output, plan = write_output(tmp_path, rows, {0: said("Yo", "안녕"), 1: said(" upon"), 2: said("")})
    lines, errors, exit_code = exported(output, tmp_path / "results")
    assert (errors, exit_code) == ([], 0)
    assert [found["custom_id"] for found in lines] == ["a", "b", "c"]
    chat, text, empty = map(accepted, lines)
    assert isinstance(chat, ChatCompletion)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in chat.choices] == [
        (0, "Yo", "stop"),
        (1, "안녕", "stop"),
    ]
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (5, 6, 11)
    assert (chat.model, chat.created) == ("my-model", CREATED_S)
    assert isinstance(text, TextCompletion)
    assert (text.object, text.choices[0].text) == ("text_completion", " upon")
    assert isinstance(empty, ChatCompletion)
    assert empty.choices[0].message.content == ""
    # Ids follow from row ids: another export says the same.
    shard_id = plan.shards[0].shard_id
    assert lines[0]["id"] == f"batch_req_{shard_id}_0"
    assert chat.id == f"chatcmpl-{shard_id}_0"
    assert text.id == f"cmpl-{shard_id}_1"
    assert exported(output, tmp_path / "again")[0] == lines


def test_every_row_is_in_one_of_the_files_and_in_order(tmp_path: Path) -> None:
    rows = [line(f"row-{number}", CHAT) for number in range(6)]
    output, plan = write_output(
        tmp_path,
        rows,
        {
            0: said("a"),
            1: failed("unsupported_field", "tools: not supported"),
            2: failed("killed_replica", "killed its replica twice"),
            3: said("b"),
            4: said("c"),
            5: failed("too_long", "4097 tokens do not fit 4096"),
        },
    )
    lines, errors, exit_code = exported(output, tmp_path / "results")
    assert exit_code == 1
    assert [found["custom_id"] for found in lines] == ["row-0", "row-3", "row-4"]
    assert [found["custom_id"] for found in errors] == ["row-1", "row-2", "row-5"]
    assert errors[0] == {
        "id": f"batch_req_{plan.shards[0].shard_id}_1",
        "custom_id": "row-1",
        "response": {
            "status_code": 400,
            "request_id": f"req_{plan.shards[0].shard_id}_1",
            "body": {
                "error": {
                    "message": "tools: not supported",
                    "type": "invalid_request_error",
                    "param": "tools",
                    "code": "unsupported_field",
                }
            },
        },
        "error": None,
    }
    assert (errors[1]["response"], errors[1]["error"]) == (
        None,
        {"code": "killed_replica", "message": "killed its replica twice"},
    )
    assert errors[2]["response"]["body"]["error"]["code"] == "too_long"


def test_a_dead_letter_without_its_reason_is_an_error_all_the_same(tmp_path: Path) -> None:
    rows = [line(f"row-{number}", CHAT) for number in range(2)]
    output, plan = write_output(tmp_path, rows, {0: said("a"), 1: failed("too_long", "x")})
    errors_part(output, plan.units[0].unit_id).remove()
    lines, errors, _ = exported(output, tmp_path / "results")
    assert len(lines) == 1
    # Its input row went with it; the row id is what is left.
    assert errors[0]["custom_id"] == plan.units[0].row_id(1)
    assert errors[0]["error"]["code"] == "reason_lost"


def test_what_is_not_committed_yet_is_in_neither_file(tmp_path: Path) -> None:
    rows = [line(f"row-{number}", CHAT) for number in range(4)]
    output, _ = write_output(tmp_path, rows, {2: said("a"), 3: said("b")})
    lines, errors, exit_code = exported(output, tmp_path / "results")
    assert ([found["custom_id"] for found in lines], errors, exit_code) == (["row-2", "row-3"], [], 3)


def test_without_its_columns_a_line_falls_back_to_what_is_known(tmp_path: Path) -> None:
    rows = [line("a", CHAT)]
    output, plan = write_output(tmp_path / "1", rows, {0: said("x")}, columns=["url"])
    ((found,), _, _) = exported(output, tmp_path / "1" / "results")
    assert found["custom_id"] == plan.units[0].row_id(0)
    assert accepted(found).model == "Some-Model"
    output, _ = write_output(tmp_path / "2", rows, {0: said("x")}, columns=["custom_id"])
    with pytest.raises(OutputError, match=r"needs the column body or url .* output\.columns"):
        export(str(output), str(tmp_path / "2" / "results"), "openai-batch")
    assert not (tmp_path / "2" / "results").exists()


def test_a_job_of_other_prompts_is_a_batch_of_chats(tmp_path: Path) -> None:
    output, _ = write_output(tmp_path, [{"prompt": "Hi"}], {0: said("Yo")}, columns=["prompt"], job=described(None))
    ((found,), _, _) = exported(output, tmp_path / "results")
    assert isinstance(accepted(found), ChatCompletion)


# Log-probabilities ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, chat_template=None)
    return directory


def positions(tokenizer: Path, text: str) -> list[TokenLogprobs]:
    """Of a text and the end of its turn, each token a little less likely than the one before."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = [*backend.encode(text).ids, backend.token_to_id("[|endofturn|]")]
    return [
        TokenLogprobs(token_id, -0.25 * index, ((token_id, -0.25 * index), (5, -9.0)))
        for index, token_id in enumerate(ids)
    ]


def test_log_probabilities_have_tokens_bytes_and_offsets(tmp_path: Path, tokenizer: Path) -> None:
    rows = [line("chat", {**CHAT, "logprobs": True}), line("text", {**TEXT, "logprobs": 2}, TEXT_URL), line("no", CHAT)]
    words = "안녕 there 7!"
    told = positions(tokenizer, words)
    output, _ = write_output(
        tmp_path, rows, {0: said(words, logprobs=told), 1: said(words, logprobs=told), 2: said(words)}
    )
    lines, _, _ = exported(output, tmp_path / "results", tokenizer=str(tokenizer))
    chat, text, without = map(accepted, lines)
    assert isinstance(chat, ChatCompletion)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    # What ended the answer is no part of it.
    assert len(content) == len(told) - 1
    assert bytes(byte for token in content for byte in token.bytes or ()) == words.encode()
    assert [token.logprob for token in content] == [position.logprob for position in told[:-1]]
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert isinstance(text, TextCompletion)
    beside = text.choices[0].logprobs
    assert beside is not None
    assert beside.tokens is not None
    assert beside.text_offset is not None
    assert beside.token_logprobs == [position.logprob for position in told[:-1]]
    assert beside.top_logprobs is not None
    assert len(beside.top_logprobs) == len(beside.tokens)
    for token, offset in zip(beside.tokens, beside.text_offset, strict=True):
        assert "\ufffd" in token or words[offset:].startswith(token)
    assert isinstance(without, ChatCompletion)
    assert without.choices[0].logprobs is None
    assert math.isclose(sum(beside.token_logprobs), sum(position.logprob for position in told[:-1]))


def test_tokens_behind_a_stop_string_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    told = positions(tokenizer, "one two")
    texts = load_token_texts(str(tokenizer))
    kept = texts.of_chat("one", [{"token_id": p.token_id, "logprob": p.logprob, "top": []} for p in told])["content"]
    assert bytes(byte for token in kept for byte in token["bytes"]) == b"one"
    assert texts.of_chat("", [{"token_id": told[-1].token_id, "logprob": -1.0, "top": []}])["content"] == []


def test_log_probabilities_without_a_tokenizer_say_where_to_give_one(tmp_path: Path, tokenizer: Path) -> None:
    output, _ = write_output(tmp_path, [line("a", CHAT)], {0: said("x", logprobs=positions(tokenizer, "x"))})
    with pytest.raises(OutputError, match="--tokenizer DIRECTORY"):
        export(str(output), str(tmp_path / "results"), "openai-batch")
    assert not (tmp_path / "results").exists()


def test_the_command_knows_every_form() -> None:
    (choice,) = [param.type for param in main.commands["export"].params if param.name == "format_"]
    assert isinstance(choice, click.Choice)
    assert tuple(choice.choices) == FORMATS


def test_the_command_writes_a_batch(tmp_path: Path) -> None:
    rows = [line("a", CHAT), line("b", CHAT)]
    output, _ = write_output(tmp_path, rows, {0: said("x"), 1: failed("too_long", "y")})
    arguments = ["export", str(output), str(tmp_path / "results"), "--format", "openai-batch", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["num_files"] == 2
