"""Jobs over JSON Lines: the rows of the same job over Parquet, whatever dies on the way and whatever is added later."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.cluster.prepare import prepare
from batchinfer.errors import InputError
from batchinfer.models.tokenizer import load_tokenizer
from tests.faults.runs import SLOW_FAKE, CommandRun, num_parts
from tests.jobs import (
    command,
    fake_job,
    job,
    job_values,
    model_without_weights,
    prompts,
    read_dead_letters,
    read_rows,
    write_input,
    write_job_file,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_without_weights(tmp_path_factory.mktemp("model"))


def as_lines(parquet: Path, target: Path) -> Path:
    """Every Parquet file of a directory as JSON Lines beside it, one of them compressed."""
    target.mkdir()
    for index, path in enumerate(sorted(parquet.glob("*.parquet"))):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pq.read_table(path).to_pylist())
        name = f"{path.stem}.jsonl"
        if index == 1:
            (target / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (target / name).write_text(content, encoding="utf-8")
    return target


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_replicas_that_die_over_json_lines_leave_the_rows_of_a_quiet_parquet_job(tmp_path: Path, model: Path) -> None:
    """A row of the compressed shard kills its replica: its unit is read again and again, in parts."""
    tokenize = load_tokenizer(model)
    parquet = write_input(tmp_path / "parquet", [20, 12])
    lines = as_lines(parquet, tmp_path / "lines")
    poisoned = {"id": 32, "prompt": "\N{SKULL AND CROSSBONES}"}
    content = gzip.decompress((lines / "part-1.jsonl.gz").read_bytes()) + json.dumps(poisoned).encode()
    (lines / "part-1.jsonl.gz").write_bytes(gzip.compress(content))
    poison_ids = set(tokenize(poisoned["prompt"])["input_ids"]) - set(tokenize(" ".join(prompts(32)))["input_ids"])

    batchinfer.run(fake_job(model, parquet, tmp_path / "quiet"))
    engine = {"fake": {"poison_token_id": min(poison_ids)}}
    result = batchinfer.run(fake_job(model, lines, tmp_path / "out", engine=engine))
    assert (result.num_completions, result.num_dead_letters) == (32, 1)
    assert result.num_replicas_died > 1
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "quiet")
    schemas = [pq.read_schema(next((tmp_path / name / "completions").iterdir())) for name in ("out", "quiet")]
    assert schemas[0].equals(schemas[1])
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete_with_dead_letters"


@pytest.mark.slow
def test_a_killed_driver_over_json_lines_is_continued_to_the_rows_of_the_parquet_job(
    tmp_path: Path, model: Path
) -> None:
    parquet = write_input(tmp_path / "parquet", [100, 60])
    as_lines(parquet, tmp_path / "lines")
    values = job_values(model, tmp_path / "lines", tmp_path / "out", engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    file = write_job_file(tmp_path / "job.yaml", values)
    for num_committed in (1, 8):
        run = CommandRun(file)
        run.wait_for(lambda number=num_committed: num_parts(tmp_path / "out") >= number)  # type: ignore[misc]
        run.kill_driver()
    assert CommandRun(file).wait() == 0
    quiet = job_values(model, parquet, tmp_path / "quiet", engine={"kind": "fake"})
    assert CommandRun(write_job_file(tmp_path / "quiet.yaml", quiet)).wait() == 0
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "quiet")


@pytest.mark.usefixtures("ray_session")
def test_a_folder_of_json_lines_may_grow_and_change_and_bad_lines_stay_dead_letters(
    tmp_path: Path, model: Path
) -> None:
    """1. a bad line is a dead letter  2. nothing is left  3. only a new shard is done  4. a changed one is done anew"""
    source = tmp_path / "in"
    source.mkdir()
    rows: list[dict[str, Any]] = [{"id": n, "prompt": text, "tag": "t"} for n, text in enumerate(prompts(40))]
    lines = [json.dumps(row) for row in rows]
    lines[7] = lines[7][:-1]
    lines[20] = json.dumps({**rows[20], "prompt": 20})
    (source / "a.jsonl").write_text("\n".join(lines))
    spec = fake_job(model, source, tmp_path / "out")
    result = batchinfer.run(spec)
    assert (result.exit_code, result.num_completions, result.num_dead_letters) == (1, 38, 2)
    assert sorted(kind for _, kind in read_dead_letters(tmp_path / "out")) == ["bad_json", "bad_value"]
    errors = {row["error_type"]: row for row in pq.read_table(tmp_path / "out" / "errors").to_pylist()}
    assert errors["bad_json"]["error"].startswith("line 8: Expecting ',' delimiter at character ")
    assert (errors["bad_json"]["id"], errors["bad_value"]["id"]) == (None, 20)

    assert batchinfer.run(spec).run_id == ""
    (source / "b.jsonl").write_text(json.dumps({**rows[0], "id": 40}) + "\n")
    assert batchinfer.run(spec).num_completions == 1
    lines[7] = json.dumps(rows[7])
    (source / "a.jsonl").write_text("\n".join(lines))
    again = batchinfer.run(spec)
    assert (again.num_completions, again.num_dead_letters) == (39, 1)
    assert [row[0] for row in read_rows(tmp_path / "out")] == [n for n in range(41) if n != 20]

    report = json.loads(command("verify", tmp_path / "out", "--deep", "--json").stdout)
    assert (report["verdict"], report["remarks"]) == ("complete_with_dead_letters", [])
    with (source / "b.jsonl").open("a") as file:
        file.write(json.dumps({**rows[1], "id": 41, "tag": 5}) + "\n")
    report = json.loads(command("verify", tmp_path / "out", "--deep", "--json").stdout)
    assert [(remark["kind"], remark["where"]) for remark in report["remarks"]] == [("input_changed", "b.jsonl")]
    with pytest.raises(InputError, match="column 'tag' of the input is of several types now, but plain strings in"):
        prepare(spec)
    (source / "b.jsonl").write_text(json.dumps({**rows[0], "id": 40.5}) + "\n")
    with pytest.raises(InputError, match="column 'id' of the input is double now, but int64 in"):
        prepare(spec)


def by_duckdb(query: str) -> list[list[object]]:
    """Rows of a query; in a process of its own, since DuckDB reports leaks of its own at the end of any other."""
    program = "import duckdb, json, sys; print(json.dumps(duckdb.sql(sys.argv[1]).fetchall()))"
    command = [sys.executable, "-c", program, query]
    rows: list[list[object]] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return rows


@pytest.mark.usefixtures("ray_session")
def test_what_others_write_is_read_and_what_is_written_others_read(tmp_path: Path, exaone: Path) -> None:
    """JSON Lines of pandas and DuckDB in; pandas, DuckDB and datasets over the output."""
    source = tmp_path / "in"
    source.mkdir()
    frame = pd.DataFrame(
        {"id": range(8), "prompt": prompts(8), "score": [0.5, None] * 4, "tags": [["가", "b"], []] * 4}
    )
    frame.to_json(source / "pandas.jsonl", orient="records", lines=True, force_ascii=False)
    frame.assign(id=range(8, 16)).to_json(source / "zipped.jsonl.gz", orient="records", lines=True)
    later = f"SELECT * REPLACE (id + 16 AS id) FROM read_json('{source / 'pandas.jsonl'}')"
    assert by_duckdb(f"COPY ({later}) TO '{source / 'duckdb.ndjson'}' (FORMAT json)") == [[8]]
    assert batchinfer.run(job(exaone, source, tmp_path / "out")).outcome == "complete"

    parts = tmp_path / "out" / "completions"
    expected = pd.concat([frame.assign(id=range(first, first + 8)) for first in (0, 8, 16)], ignore_index=True)
    found = pd.read_parquet(parts).sort_values("id", ignore_index=True)
    assert found["prompt"].tolist() == expected["prompt"].tolist()
    assert found["score"].equals(expected["score"])
    assert [list(tags) for tags in found["tags"]] == expected["tags"].tolist()
    counted = by_duckdb(f"SELECT count(*), sum(length(completion))::BIGINT FROM '{parts}/*.parquet'")
    assert counted == [[24, found["completion"].str.len().sum()]]

    import datasets

    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_dir=str(parts), split="train", cache_dir=cache)
    assert sorted(loaded["id"]) == list(range(24))
    given = datasets.load_dataset("json", data_files=str(source / "pandas.jsonl"), split="train", cache_dir=cache)
    assert given["prompt"] == expected["prompt"].tolist()[:8]
