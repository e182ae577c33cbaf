"""Bad input: an error that names the thing and the way out, exit 2, nothing half-written; bad rows cost no others.

What is wrong with the job as a whole is found before Ray is started, but for what only loading the model can tell.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from batchinfer.cluster.prepare import prepare
from batchinfer.cluster.run_record import RunRecord
from batchinfer.job_file import load_job
from tests.jobs import (
    command,
    job_values,
    model_without_weights,
    prompts,
    read_dead_letters,
    read_rows,
    write_input,
    write_job_file,
)
from tests.tiny import EXAONE3_TEMPLATE, tiny_exaone3, tiny_llama, write_tokenizer

Values = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """A good job's directory and values, to be spoilt."""

    root: Path
    values: Values

    @property
    def output(self) -> Path:
        return self.root / "out"

    def file(self) -> Path:
        return write_job_file(self.root / "job.yaml", self.values)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A job over the fake engine that would run."""
    model = model_without_weights(tmp_path / "model")
    source = write_input(tmp_path / "in", [20, 10])
    return Case(tmp_path, job_values(model, source, tmp_path / "out", engine={"kind": "fake"}))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a run fail that gets as far as the cluster."""

    def connected(*arguments: object) -> None:
        raise AssertionError("the job was not refused before the cluster")

    monkeypatch.setattr("batchinfer.cluster.driver.connected", connected)


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def refused(case: Case, *named: str) -> str:
    """Both commands end with 2, name these things and leave every file as it was; returns the message."""
    file = case.file()
    before = snapshot(case.root)
    message = ""
    for name in ("plan", "run"):
        result = command(name, file, "--json")
        assert result.exit_code == 2, result.output
        message = json.loads(result.stdout)["error"]
        for thing in named:
            assert thing in message
        assert f"Error: {message}" in result.stderr
        assert "Traceback" not in result.stderr
    assert snapshot(case.root) == before
    return message


# The job file ------------------------------------------------------------------------------------------


def unknown_key(case: Case) -> None:
    case.values["sampling"]["max_new_token"] = 3


def unknown_block(case: Case) -> None:
    case.values["samplings"] = {}


def missing_variable(case: Case) -> None:
    case.values["input"]["path"] = "${NO_SUCH_BUCKET}/prompts"


def wrong_value(case: Case) -> None:
    case.values["sampling"]["temperature"] = "warm"


def two_sources(case: Case) -> None:
    case.values["prompt"]["messages"] = "messages"


# Input -------------------------------------------------------------------------------------------------


def missing_file(case: Case) -> None:
    case.values["input"]["path"] = str(case.root / "in" / "nowhere.parquet")


def missing_glob(case: Case) -> None:
    case.values["input"]["path"] = str(case.root / "in" / "day-*.parquet")


def missing_column(case: Case) -> None:
    case.values["prompt"]["text"] = "promt"


def missing_template_column(case: Case) -> None:
    case.values["prompt"] = {"template": "Translate: {{ prompts }}", "chat": False}


def missing_passed_column(case: Case) -> None:
    case.values["output"]["columns"] = ["idd"]


def wrong_type(case: Case) -> None:
    case.values["prompt"]["text"] = "id"


def wrong_type_in_one_shard(case: Case) -> None:
    pq.write_table(pa.table({"id": [1], "prompt": [[1, 2]]}), case.root / "in" / "part-1.parquet")


def no_shards(case: Case) -> None:
    for shard in (case.root / "in").iterdir():
        shard.rename(shard.with_suffix(".txt"))


def only_broken_shards(case: Case) -> None:
    for shard in (case.root / "in").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1])


# Output ------------------------------------------------------------------------------------------------


def output_is_input(case: Case) -> None:
    case.values["output"]["path"] = str(case.root / "in")


def output_inside_input(case: Case) -> None:
    case.values["output"]["path"] = str(case.root / "in" / "answers")


def input_inside_output(case: Case) -> None:
    case.values["output"]["path"] = str(case.root)


def output_reached_by_a_glob(case: Case) -> None:
    case.values["input"]["path"] = str(case.root / "**" / "*.parquet")


def foreign_output(case: Case) -> None:
    case.output.mkdir()
    (case.output / "thesis.tex").touch()


def file_as_output(case: Case) -> None:
    case.output.touch()


# Model -------------------------------------------------------------------------------------------------


def real_engine(case: Case, directory: Path) -> None:
    case.values["model"]["path"] = str(directory)
    case.values["engine"]["kind"] = "auto"


def no_model(case: Case) -> None:
    case.values["model"]["path"] = str(case.root / "no such model")


def model_without_config(case: Case) -> None:
    (case.root / "model" / "config.json").unlink()


def pickles_only(case: Case) -> None:
    real_engine(case, case.root / "model")
    (case.root / "model" / "pytorch_model.bin").write_bytes(b"pickle")


def keys_that_do_not_fit(case: Case) -> None:
    directory = tiny_exaone3(case.root / "exaone")
    weights = load_file(directory / "model.safetensors")
    weights["transformer.h.0.attn.attention.query.weight"] = weights.pop("transformer.h.0.attn.attention.q_proj.weight")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    real_engine(case, directory)


def truncated_weights(case: Case) -> None:
    directory = tiny_exaone3(case.root / "exaone")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    real_engine(case, directory)


def own_code(case: Case) -> None:
    directory = tiny_exaone3(case.root / "exaone")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "exaone9"}))
    real_engine(case, directory)


def no_tokenizer(case: Case) -> None:
    (case.root / "model" / "tokenizer.json").unlink()


def chat_without_template(case: Case) -> None:
    write_tokenizer(case.root / "model", chat_template=None)
    case.values["prompt"]["chat"] = True


def context_too_long(case: Case) -> None:
    case.values["model"]["max_model_len"] = 4096


def no_room_for_a_prompt(case: Case) -> None:
    case.values["sampling"] = {"max_new_tokens": 512, "min_new_tokens": 512}


SPOILT: list[tuple[Callable[[Case], None], tuple[str, ...]]] = [
    (unknown_key, ("sampling.max_new_token", "unknown key", "did you mean 'max_new_tokens'?")),
    (unknown_block, ("samplings", "did you mean 'sampling'?")),
    (missing_variable, ("input.path", "NO_SUCH_BUCKET")),
    (wrong_value, ("sampling.temperature", "expected a number", "'warm'")),
    (two_sources, ("prompt", "exactly one of", "text, messages")),
    (missing_file, ("nowhere.parquet: no such file or directory", "check input.path")),
    (missing_glob, ("day-*.parquet: the glob matches no file", "check it")),
    (missing_column, ("shard part-0.parquet", "no column 'promt'", "did you mean 'prompt'?")),
    (missing_template_column, ("shard part-0.parquet", "no column 'prompts'", "did you mean 'prompt'?")),
    (missing_passed_column, ("shard part-0.parquet", "no column 'idd'", "did you mean 'id'?")),
    (wrong_type, ("shard part-0.parquet", "'id' is int64", "prompt.text needs string", "convert this one")),
    (wrong_type_in_one_shard, ("shard part-1.parquet", "'prompt' is list", "prompt.text needs string")),
    (no_shards, ("/in: ", "no shards in", "expected *.parquet, *.jsonl")),
    (only_broken_shards, ("none of 2 shards can be read", "part-0.parquet")),
    (output_is_input, ("output.path", "/in is where input.path", "choose another output.path")),
    (output_inside_input, ("/in/answers lies inside input.path", "choose an output.path beside the input")),
    (input_inside_output, ("/in lies inside output.path", "choose another output.path")),
    (output_reached_by_a_glob, ("lies inside input.path", "choose an output.path beside the input")),
    (foreign_output, ("/out: holds thesis.tex", "choose an empty or a new directory")),
    (file_as_output, ("/out: is a file", "must name a directory")),
    (no_model, ("model.path", "no such model", "no such directory")),
    (model_without_config, ("/model: no config.json", "hub layout")),
    (pickles_only, ("/model: weights are pickles only (pytorch_model.bin)", "convert each once")),
    (
        keys_that_do_not_fit,
        ("/exaone: the tensors do not fit config.json", "1 missing", "1 unexpected", "use a complete"),
    ),
    (truncated_weights, ("model.safetensors", "again")),
    (own_code, ("exaone9",)),
    (no_tokenizer, ("/model: no tokenizer", "tokenizer.json", "prompt.token_ids")),
    (chat_without_template, ("/model: ", "applies a chat template and the model has none", "set prompt.chat: false")),
    (context_too_long, ("model.max_model_len 4096", "limit of 512", "lower it or leave it out")),
    (no_room_for_a_prompt, ("sampling.min_new_tokens 512", "512 tokens; lower it")),
]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("spoil", "named"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_a_wrong_job_is_refused_with_the_way_out_and_nothing_is_written(
    case: Case, spoil: Callable[[Case], None], named: tuple[str, ...]
) -> None:
    spoil(case)
    refused(case, *named)


def test_several_mistakes_are_reported_together(case: Case) -> None:
    unknown_key(case)
    wrong_value(case)
    missing_variable(case)
    message = refused(case)
    lines = message.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{case.root / 'job.yaml'}:") for line in lines)


def test_a_job_file_that_is_not_there_or_no_yaml_is_named(tmp_path: Path) -> None:
    result = command("run", tmp_path / "job.yml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "job.yml: the job file cannot be read: No such file" in result.stderr
    (tmp_path / "job.yml").write_text("model: [")
    result = command("run", tmp_path / "job.yml")
    assert result.exit_code == 2
    assert "job.yml:1:" in result.stderr


@pytest.mark.usefixtures("no_ray")
def test_the_output_of_another_job_is_refused_with_what_differs(case: Case) -> None:
    with RunRecord(prepare(load_job(case.file())), "20260101T000000-aaaaaa") as record:
        record.begin()
    case.values["sampling"]["temperature"] = 0.7
    case.values["prompt"] = {"template": "Say it in Korean: {{ prompt }}"}
    message = refused(case, "/out was begun by a job that generates something else", "choose another output.path")
    assert "sampling.temperature: 0.0 in the output, 0.7 in the job" in message
    assert 'prompt.text: "prompt" in the output, null in the job' in message
    assert "prompt.template: null in the output" in message


@pytest.mark.usefixtures("ray_session")
def test_weights_that_only_loading_can_refuse_leave_nothing_either(case: Case) -> None:
    """The preflight knows EXAONE 3.x tensor by tensor; of other families the loader has the last word."""
    directory = tiny_llama(case.root / "llama")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    real_engine(case, directory)
    result = command("run", case.file(), "--json")
    assert result.exit_code == 2, result.output
    written = json.loads(result.stdout)
    assert written["error_type"] == "ModelError"
    assert "model.layers.1.mlp.up_proj.weight" in written["error"]
    assert not case.output.exists()


# Bad rows ----------------------------------------------------------------------------------------------

#: Refuses roles it does not know, as many real templates do.
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + message['role']) }}{% endif %}{% endfor %}" + EXAONE3_TEMPLATE
)
MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
BAD_CHATS: dict[str, list[dict[str, str | None] | None] | None] = {
    "null_prompt": None,
    "empty_prompt": [],
    "bad_messages": [{"role": None, "content": "who speaks?"}],
    "too_long": [{"role": "user", "content": "세상 " * 500}],
    "template_error": [{"role": "narrator", "content": "Once upon a time"}],
}


@pytest.mark.usefixtures("ray_session")
def test_bad_rows_become_dead_letters_with_their_input_and_the_job_goes_on(case: Case) -> None:
    write_tokenizer(case.root / "model", chat_template=STRICT_TEMPLATE)
    good: list[list[dict[str, str | None] | None] | None] = [
        [{"role": "user", "content": text}] for text in prompts(30)
    ]
    chats = [*good[:15], *BAD_CHATS.values(), [None], *good[15:]]
    for shard in (case.root / "in").iterdir():
        shard.unlink()
    table = pa.table({"id": pa.array(range(36)), "messages": pa.array(chats, MESSAGES)})
    pq.write_table(table, case.root / "in" / "chats.parquet")
    case.values["prompt"] = {"messages": "messages"}

    result = command("run", case.file(), "--json")
    assert result.exit_code == 1, result.output
    written = json.loads(result.stdout)
    expected = {**dict.fromkeys(BAD_CHATS, 1), "bad_messages": 2}
    assert written["outcome"] == "dead_letters"
    assert written["dead_letters_by_type"] == expected
    assert (written["num_rows_committed"], written["num_completions"]) == (36, 30)

    bad = range(15, 21)
    assert [row[0] for row in read_rows(case.output)] == [number for number in range(36) if number not in bad]
    letters = pq.read_table(case.output / "errors").sort_by("id").to_pylist()
    assert [row["id"] for row in letters] == list(bad)
    assert [row["error_type"] for row in letters] == [*BAD_CHATS, "bad_messages"]
    assert letters[4]["messages"] == BAD_CHATS["template_error"]
    assert "no such role: narrator" in letters[4]["error"]
    assert "limit of 512" in letters[3]["error"]

    verdict = command("verify", case.output, "--json")
    assert verdict.exit_code == 1
    assert json.loads(verdict.stdout)["verdict"] == "complete_with_dead_letters"
    # Nothing is left to try: the dead letters are the answer.
    again = command("run", case.file())
    assert again.exit_code == 1
    assert "everything is committed already: 36 rows in 3 units, 6 of them dead letters" in again.stdout


# Bad shards --------------------------------------------------------------------------------------------


def write_plain_shard(path: Path, first: int, num_rows: int) -> None:
    """Small pages with checksums, values verbatim: one byte spoils some rows and is noticed."""
    numbers = range(first, first + num_rows)
    pq.write_table(
        pa.table({"id": numbers, "prompt": [f"prompt {number}" for number in numbers]}),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=256,
        write_batch_size=8,
        write_page_checksum=True,
    )


@pytest.mark.usefixtures("ray_session")
def test_damaged_shards_are_reported_by_name_and_the_others_finish(case: Case) -> None:
    """One shard without a readable footer, one with a byte of a data page overwritten, one whole."""
    source = case.root / "in"
    for shard in source.iterdir():
        shard.unlink()
    for index, name in enumerate(("corrupt", "truncated", "whole")):
        write_plain_shard(source / f"{name}.parquet", 100 * index, 40)
    content = bytearray((source / "corrupt.parquet").read_bytes())
    content[content.index(b"prompt 25")] ^= 0xFF
    (source / "corrupt.parquet").write_bytes(content)
    (source / "truncated.parquet").write_bytes((source / "truncated.parquet").read_bytes()[:-200])

    plan = command("plan", case.file(), "--json", "--full")
    assert plan.exit_code == 0
    planned = json.loads(plan.stdout)
    assert [shard["path"] for shard in planned["unreadable_shards"]] == ["truncated.parquet"]

    result = command("run", case.file())
    assert result.exit_code == 1, result.output
    assert "unreadable shard truncated.parquet: none of its rows was planned" in result.stdout
    assert "shard_corrupt" in result.stdout

    generated = [int(str(row[0])) for row in read_rows(case.output)]
    assert [number for number in generated if number >= 100] == list(range(200, 240))
    readable = [number for number in generated if number < 100]
    assert readable == list(range(len(readable)))
    assert 0 < len(readable) <= 25
    letters = pq.read_table(case.output / "errors").to_pylist()
    assert {row["error_type"] for row in letters} == {"shard_corrupt"}
    assert all("corrupt.parquet" in row["error"] for row in letters)
    assert len(read_dead_letters(case.output)) == 40 - len(readable)
    # `plan --full` has read every row and knew.
    assert planned["prompts"]["dead_letters_by_shard"] == {"corrupt.parquet": {"shard_corrupt": len(letters)}}

    verdict = json.loads(command("verify", case.output, "--json").stdout)
    assert verdict["verdict"] == "complete_with_dead_letters"
    assert [(it["kind"], it["where"]) for it in verdict["findings"]] == [("unreadable_shard", "truncated.parquet")]
    status = json.loads(command("status", case.output, "--json").stdout)
    assert (status["state"], status["num_unreadable_shards"]) == ("dead_letters", 1)
