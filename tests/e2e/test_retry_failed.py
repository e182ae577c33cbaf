"""``retry-failed``: dead letters alone are generated, what was completed stays, nothing is doubled."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.errors import LeaseHeld
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import read_job
from batchinfer.storage.lease import acquire
from tests.jobs import (
    command,
    fake_job,
    job_values,
    model_without_weights,
    prompts,
    read_dead_letters,
    read_rows,
    write_input,
    write_job_file,
)

pytestmark = pytest.mark.usefixtures("ray_session")

#: With so many tokens for prompt and completion some of the prompts are too long.
SHORT = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_without_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("rows"), [40, 23])


@pytest.fixture
def job(model: Path, rows: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """The job with a short context, or whatever else a block says."""

    def make(**blocks: Mapping[str, object]) -> JobSpec:
        values: dict[str, Mapping[str, object]] = {
            "model": {"max_model_len": SHORT},
            "sampling": {"n": 2, "max_new_tokens": 12},
        }
        return fake_job(model, rows, tmp_path / "out", **{**values, **blocks})

    return make


#: The context as long as the model has it.
LONGER = {"max_model_len": None}


def test_a_longer_context_turns_dead_letters_into_the_rows_a_run_would_have_written(
    tmp_path: Path, model: Path, rows: Path, job: Callable[..., JobSpec]
) -> None:
    undisturbed = fake_job(model, rows, tmp_path / "whole", sampling={"n": 2, "max_new_tokens": 12})
    batchinfer.run(undisturbed)
    first = batchinfer.run(job())
    assert 0 < first.num_dead_letters < 63
    before = set(read_rows(tmp_path / "out"))

    result = batchinfer.retry_failed(job(model=LONGER))
    assert (result.exit_code, result.num_dead_letters, result.num_completions) == (0, 0, 2 * first.num_dead_letters)
    assert (result.num_rows_committed, result.num_units_committed) == (63, first.num_units)
    # Completed rows stay as they were made, some of them cut short by the first job's limit.
    completed = {row[0] for row in before}
    new = {row for row in read_rows(tmp_path / "whole") if row[0] not in completed}
    assert read_rows(tmp_path / "out") == sorted(before | new)
    assert list((tmp_path / "out" / "errors").iterdir()) == []
    deep = batchinfer.verify_deep(str(tmp_path / "out"))
    assert (deep.verdict, deep.findings, deep.remarks) == ("complete", (), ())

    # The output is still the first job's: it runs on as before, and says what was changed and when.
    assert batchinfer.run(job()).exit_code == 0
    written = read_job(locate(str(tmp_path / "out")))
    assert written is not None
    assert written["fingerprint"] == first.fingerprint
    (note,) = written["retries"]
    assert note["changed"] == {"model.max_model_len": [str(SHORT), "null"]}
    assert (note["run"], note["num_dead_letters"]) == (result.run_id, first.num_dead_letters)
    assert (note["num_units"], note["error_types"]) == (5, [])


def test_only_the_dead_letters_of_a_type_are_tried(tmp_path: Path, model: Path) -> None:
    values = job_values(
        model, write_input(tmp_path / "in", [30]), tmp_path / "out",
        engine={"kind": "fake"}, model={"max_model_len": SHORT},
    )  # fmt: skip
    table = pq.read_table(tmp_path / "in" / "part-0.parquet")
    texts = [None, "", *table.column("prompt").to_pylist()[2:]]
    pq.write_table(table.set_column(1, "prompt", [texts]), tmp_path / "in" / "part-0.parquet")
    file = write_job_file(tmp_path / "job.yaml", values)
    assert command("run", file).exit_code == 1
    dead = read_dead_letters(tmp_path / "out")
    num_too_long = sum(kind == "too_long" for _, kind in dead)
    assert num_too_long > 0

    kept = [letter for letter in dead if letter[1] != "too_long"]
    longer_yet = ("--set", "model.max_model_len=null")
    none = command("retry-failed", file, *longer_yet, "--error-type", "engine_error")
    assert (none.exit_code, read_dead_letters(tmp_path / "out")) == (1, dead)
    assert f"nothing to try; {len(dead)} dead letters stay as they are" in none.stdout
    some = command("retry-failed", file, *longer_yet, "--error-type", "too_long", "--json")
    assert some.exit_code == 1
    assert json.loads(some.stdout)["num_completions"] == num_too_long
    assert read_dead_letters(tmp_path / "out") == kept == [(kept[0][0], "null_prompt"), (kept[1][0], "empty_prompt")]
    assert set(pq.read_table(tmp_path / "out" / "errors").column("attempts").to_pylist()) == {1}
    all_of_them = command("retry-failed", file, *longer_yet)
    assert all_of_them.exit_code == 1
    assert "dead letters left" in all_of_them.stdout
    assert read_dead_letters(tmp_path / "out") == kept


def test_rows_of_units_that_were_never_committed_are_left_to_run(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    batchinfer.run(job())
    whole = read_rows(tmp_path / "out")
    parts = sorted((tmp_path / "out" / "completions").iterdir())
    parts[0].unlink()
    result = batchinfer.retry_failed(job(model=LONGER))
    assert (result.exit_code, result.num_units - result.num_units_committed) == (3, 1)
    assert not parts[0].exists()
    assert batchinfer.run(job()).exit_code == 1
    assert set(whole) <= set(read_rows(tmp_path / "out"))
    assert batchinfer.verify_deep(str(tmp_path / "out")).findings == ()


def test_a_live_output_refuses_a_retry(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    batchinfer.run(job())
    acquire(locate(str(tmp_path / "out")), "the-other-run", timeout_s=60.0)
    with pytest.raises(LeaseHeld, match="the-other-run"):
        batchinfer.retry_failed(job(model=LONGER))


@pytest.mark.slow
def test_a_row_that_kills_replicas_is_found_among_the_dead_letters(tmp_path: Path, model: Path) -> None:
    """All rows are too long at first; in the retry one of them kills every replica that generates it."""
    source = write_input(tmp_path / "in", [5])
    assert batchinfer.run(fake_job(model, source, tmp_path / "out", model={"max_model_len": 2})).num_dead_letters == 5
    tokenizer = load_tokenizer(model)
    token_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts(5)]
    poison = next(iter(set(token_ids[3]) - {token_id for row in (0, 1, 2, 4) for token_id in token_ids[row]}))

    result = batchinfer.retry_failed(
        fake_job(model, source, tmp_path / "out", engine={"fake": {"poison_token_id": poison}})
    )
    assert (result.exit_code, result.num_dead_letters, result.num_completions) == (1, 1, 4)
    assert result.num_replicas_died >= 2
    assert [row[0] for row in read_rows(tmp_path / "out")] == [0, 1, 2, 4]
    assert [kind for _, kind in read_dead_letters(tmp_path / "out")] == ["killed_replica"]
    deep = batchinfer.verify_deep(str(tmp_path / "out"))
    assert (deep.verdict, deep.findings, deep.remarks) == ("complete_with_dead_letters", (), ())
