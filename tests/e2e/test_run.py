"""Whole jobs on a local Ray: what comes out does not depend on how the work was cut, batched or spread."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.errors import FingerprintMismatch, LeaseHeld
from batchinfer.storage.filesystem import locate
from batchinfer.storage.lease import acquire
from tests.jobs import job, prompts, read_dead_letters, read_rows, write_input
from tests.tiny import tiny_exaone4, tiny_exaone35_tied, tiny_llama

pytestmark = pytest.mark.usefixtures("ray_session")

GREEDY = {"max_new_tokens": 12}
SAMPLED = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "n": 2, "seed": 11}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("rows"), [40, 23, 1])


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def undisturbed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    exaone: Path,
    rows: Path,
    ray_session: None,
) -> tuple[dict[str, object], list[tuple[object, ...]]]:
    """(sampling, rows of a plain run): one replica, large batches, the usual units."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    result = batchinfer.run(job(exaone, rows, output, sampling=request.param))
    assert result.outcome == "complete"
    assert batchinfer.verify(str(output)).verdict == "complete"
    return request.param, read_rows(output)


@pytest.mark.parametrize(
    "blocks",
    [
        {"engine": {"max_batch_rows": 5}, "execution": {"rows_per_unit": 1}},
        pytest.param(
            {"engine": {"max_batch_tokens": 300}, "execution": {"rows_per_unit": 1000}}, marks=pytest.mark.slow
        ),
        {"cluster": {"replicas": 3, "num_cpus": 0.5}, "engine": {"max_batch_rows": 1}},
    ],
    ids=["small-units-and-batches", "few-tokens-and-one-unit-per-shard", "three-replicas-row-by-row"],
)
def test_rows_are_the_same_however_they_are_batched_and_spread(
    tmp_path: Path,
    exaone: Path,
    rows: Path,
    undisturbed: tuple[dict[str, object], list[tuple[object, ...]]],
    blocks: dict[str, dict[str, object]],
) -> None:
    sampling, expected = undisturbed
    result = batchinfer.run(job(exaone, rows, tmp_path / "out", sampling=sampling, **blocks))
    assert result.outcome == "complete"
    assert read_rows(tmp_path / "out") == expected


def test_greedy_rows_do_not_depend_on_their_order(tmp_path: Path, exaone: Path) -> None:
    texts = prompts(48)
    shuffled = texts[:]
    random.Random(0).shuffle(shuffled)
    found = []
    for name, column in (("ordered", texts), ("shuffled", shuffled)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"prompt": column}), tmp_path / name / "rows.parquet")
        batchinfer.run(job(exaone, tmp_path / name, tmp_path / f"{name}-out"))
        found.append(read_rows(tmp_path / f"{name}-out", ("prompt", "completion")))
    assert found[0] == found[1]


@pytest.mark.parametrize("write_model", [tiny_exaone35_tied, tiny_exaone4])
def test_other_checkpoints_run_through_the_same_job(tmp_path: Path, rows: Path, write_model: object) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_model(model)  # type: ignore[operator]
    result = batchinfer.run(job(model, rows, tmp_path / "out", prompt={"text": "prompt", "chat": True}))
    assert (result.outcome, result.num_completions) == ("complete", 64)


def test_the_output_is_a_plain_data_set_and_says_what_made_it(tmp_path: Path, exaone: Path, rows: Path) -> None:
    output = tmp_path / "out"
    spec = job(exaone, rows, output, sampling={"n": 2, "temperature": 1.0, "logprobs": 3}, output={"token_ids": True})
    result = batchinfer.run(spec)
    assert result.exit_code == 0
    table = pyarrow.dataset.dataset(output / "completions").to_table()
    assert table.schema.names == [
        "id", "prompt", "row_id", "sample", "completion", "finish_reason", "num_prompt_tokens",
        "num_completion_tokens", "token_ids", "logprobs",
    ]  # fmt: skip
    assert table.num_rows == 128
    assert set(table.column("sample").to_pylist()) == {0, 1}
    for row in table.to_pylist():
        assert len(row["token_ids"]) == row["num_completion_tokens"] == len(row["logprobs"])
        assert [entry["token_id"] for entry in row["logprobs"]] == row["token_ids"]
        assert all(len(entry["top"]) == 3 for entry in row["logprobs"])
    written = json.loads((output / "_job" / "job.json").read_text())
    assert written["fingerprint"] == result.fingerprint
    assert not (output / "_job" / "lease.json").exists()
    events = [
        json.loads(line) for line in (output / "_job" / "runs" / f"{result.run_id}.jsonl").read_text().splitlines()
    ]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("unit_committed") == result.num_units


def test_token_ids_in_need_no_tokenizer(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", with_tokenizer=False)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": [0, 1], "ids": [[5, 6, 7], [8, 9]]}), tmp_path / "in" / "rows.parquet")
    spec = job(
        tmp_path / "model", tmp_path / "in", tmp_path / "out",
        prompt={"text": None, "token_ids": "ids"}, output={"token_ids": True},
    )  # fmt: skip
    assert batchinfer.run(spec).outcome == "complete"
    found = pq.read_table(tmp_path / "out" / "completions").to_pylist()
    assert [row["num_prompt_tokens"] for row in found] == [3, 2]
    assert all(len(row["token_ids"]) == row["num_completion_tokens"] > 0 for row in found)


def test_a_second_run_of_a_finished_job_does_nothing(tmp_path: Path, exaone: Path, rows: Path) -> None:
    spec = job(exaone, rows, tmp_path / "out", engine={"kind": "fake"})
    batchinfer.run(spec)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = batchinfer.run(spec)
    assert (again.run_id, again.outcome, again.num_completions) == ("", "complete", 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_job_is_refused_and_told_what_differs(tmp_path: Path, exaone: Path, rows: Path) -> None:
    batchinfer.run(job(exaone, rows, tmp_path / "out", engine={"kind": "fake"}))
    with pytest.raises(FingerprintMismatch, match=r"sampling\.max_new_tokens: 12 in the output, 13 in the job"):
        batchinfer.run(job(exaone, rows, tmp_path / "out", engine={"kind": "fake"}, sampling={"max_new_tokens": 13}))


def test_a_growing_folder_runs_only_what_is_new(tmp_path: Path, exaone: Path) -> None:
    write_input(tmp_path / "in", [20, 20])
    spec = job(exaone, tmp_path / "in", tmp_path / "out", engine={"kind": "fake"})
    batchinfer.run(spec)
    pq.write_table(pa.table({"id": range(40, 50), "prompt": prompts(10, 40)}), tmp_path / "in" / "part-2.parquet")
    grown = batchinfer.run(spec)
    assert (grown.num_rows_committed_before, grown.num_completions, grown.num_rows_committed) == (40, 10, 50)
    assert [row[0] for row in read_rows(tmp_path / "out")] == list(range(50))
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete"


def test_a_changed_shard_replaces_its_old_rows(tmp_path: Path, exaone: Path) -> None:
    write_input(tmp_path / "in", [20, 20])
    spec = job(exaone, tmp_path / "in", tmp_path / "out", engine={"kind": "fake"})
    batchinfer.run(spec)
    pq.write_table(pa.table({"id": range(100, 110), "prompt": prompts(10, 100)}), tmp_path / "in" / "part-1.parquet")
    batchinfer.run(spec)
    assert [row[0] for row in read_rows(tmp_path / "out")] == [*range(20), *range(100, 110)]
    assert len(list((tmp_path / "out" / "_job" / "superseded" / "completions").iterdir())) == 2
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete"


def test_another_unit_size_on_resume_doubles_nothing(tmp_path: Path, exaone: Path, rows: Path) -> None:
    """1. a finished output loses two parts  2. the job is run again with other units  3. every row is there once."""
    output = tmp_path / "out"
    batchinfer.run(job(exaone, rows, output, engine={"kind": "fake"}))
    expected = read_rows(output)
    for part in sorted((output / "completions").iterdir())[1:3]:
        part.unlink()
    result = batchinfer.run(job(exaone, rows, output, engine={"kind": "fake"}, execution={"rows_per_unit": 7}))
    assert result.outcome == "complete"
    assert read_rows(output) == expected


def test_a_live_output_refuses_a_second_driver(tmp_path: Path, exaone: Path, rows: Path) -> None:
    acquire(locate(str(tmp_path / "out")), "the-other-run", timeout_s=60.0)
    with pytest.raises(LeaseHeld, match="the-other-run"):
        batchinfer.run(job(exaone, rows, tmp_path / "out", engine={"kind": "fake"}))


def test_an_empty_shard_and_no_rows_at_all_are_complete(tmp_path: Path, exaone: Path) -> None:
    write_input(tmp_path / "in", [0])
    result = batchinfer.run(job(exaone, tmp_path / "in", tmp_path / "out"))
    assert (result.outcome, result.num_rows, result.num_units) == ("complete", 0, 0)
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete"


def test_rows_that_cannot_be_generated_are_dead_letters_beside_the_others(tmp_path: Path, exaone: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = ["fine", None, "", "long " * 2000, "fine too"]
    pq.write_table(pa.table({"id": range(5), "prompt": texts}), tmp_path / "in" / "rows.parquet")
    result = batchinfer.run(job(exaone, tmp_path / "in", tmp_path / "out"))
    assert (result.exit_code, result.num_completions, result.num_dead_letters) == (1, 2, 3)
    assert [row[0] for row in read_rows(tmp_path / "out")] == [0, 4]
    assert [kind for _, kind in read_dead_letters(tmp_path / "out")] == ["null_prompt", "empty_prompt", "too_long"]
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete_with_dead_letters"
    assert batchinfer.run(job(exaone, tmp_path / "in", tmp_path / "out")).exit_code == 1
