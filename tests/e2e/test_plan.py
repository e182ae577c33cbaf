"""``plan`` looks at the rows in processes of its own, and finds what the run will find."""

import json
import os
import subprocess
import sys
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.devices import processor_name
from batchinfer.errors import RunInterrupted, SpecError
from batchinfer.speeds import read_speeds, speeds_file
from batchinfer.survey.pool import worker_pool
from tests.jobs import command, job_values, model_without_weights, read_dead_letters, write_input, write_job_file

#: ``plan`` as a process that says what it has imported.
PLAN = """
import sys
from batchinfer.cli import main
try:
    main(["plan", *sys.argv[1:]])
finally:
    heavy = {"torch", "ray", "transformers"} & set(sys.modules)
    assert not heavy, heavy
"""


def planned(*arguments: str | Path) -> dict[str, Any]:
    """``plan ARGUMENTS --json``, whose own process stays light."""
    ended = subprocess.run(
        [sys.executable, "-c", PLAN, *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    written = json.loads(ended.stdout)
    assert isinstance(written, dict)
    return written


@pytest.mark.usefixtures("ray_session")
def test_what_plan_counts_is_what_the_run_then_finds(tmp_path: Path) -> None:
    """1. plan --full  2. run  3. dead letters, prompts and tokens are those that were foretold  4. nothing is left."""
    source = write_input(tmp_path / "in", [40])
    texts = ["word " * 400, None, "", "again", "again", "other"]
    table = pa.table({"id": range(100, 106), "prompt": pa.array(texts, pa.string())})
    pq.write_table(table, source / "odd.parquet")
    output = tmp_path / "out"
    values = job_values(
        model_without_weights(tmp_path / "model", limit=128), source, output, engine={"kind": "fake"}, sampling={"n": 2}
    )
    job_file = write_job_file(tmp_path / "job.yaml", values)

    survey = planned(job_file, "--full")["prompts"]
    assert not output.exists()
    assert (survey["num_rows"], survey["num_rows_seen"], survey["is_full"]) == (46, 46, True)
    assert survey["duplicates"]["num_duplicates"] == survey["duplicates"]["num_greedy_duplicates"] == 1

    assert command("run", job_file).exit_code == 1
    by_shard = survey["dead_letters_by_shard"]
    assert list(by_shard) == ["odd.parquet"]
    foretold = sorted(name for name, number in by_shard["odd.parquet"].items() for _ in range(number))
    assert foretold == sorted(error_type for _, error_type in read_dead_letters(output))
    examples = {it["row_id"] for letters in survey["dead_letters"].values() for it in letters["examples"]}
    assert examples == {row_id for row_id, _ in read_dead_letters(output)}
    rows = pq.read_table(output / "completions").to_pylist()
    assert survey["num_completions_estimate"] == len(rows)
    lengths = [row["num_prompt_tokens"] for row in rows if row["sample"] == 0]
    assert survey["prompt_tokens"]["total_estimate"] == sum(lengths)
    assert survey["prompt_tokens"]["longest"] == max(lengths)

    left = command("plan", job_file, "--json")
    assert json.loads(left.stdout)["prompts"] is None
    assert json.loads(left.stdout)["estimate_unknown"] == "nothing is left to generate"


@pytest.mark.usefixtures("ray_session")
def test_a_run_is_remembered_and_the_next_plan_rests_on_it(
    exaone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. run, with the real engine  2. plan of the same job over more rows."""
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    # A tiny model is through in a moment; a user's run of that length would tell nothing.
    monkeypatch.setattr("batchinfer.cluster.speed_meter.MIN_REPLICA_S", 0.0)
    source = write_input(tmp_path / "in", [40])
    values = job_values(exaone, source, tmp_path / "out", sampling={"ignore_eos": True, "max_new_tokens": 100})
    job_file = write_job_file(tmp_path / "job.yaml", values)
    assert command("run", job_file).exit_code == 0
    (speed,) = read_speeds(speeds_file())
    assert (speed.engine, speed.dtype, speed.source) == ("continuous", "float32", "run")
    assert speed.device == processor_name()
    assert (speed.num_completion_tokens, speed.num_completions, speed.mean_completion_tokens) == (4000, 40, 100.0)

    pq.write_table(pa.table({"id": range(80), "prompt": ["more"] * 80}), source / "tonight.parquet")
    same = json.loads(command("plan", job_file, "--json").stdout)["estimate"]
    assert same["completion_lengths_from"] == "a run of this job"
    assert same["num_completion_tokens"] == 80 * 100
    assert same["elapsed_s"] == [round(2 * speed.replica_s, 1)] * 2


def test_a_template_that_cannot_work_is_told_by_its_own_error(tmp_path: Path) -> None:
    model = model_without_weights(tmp_path / "model")
    values = job_values(
        model,
        write_input(tmp_path / "in", [3]),
        tmp_path / "out",
        engine={"kind": "fake"},
        sampling={"stop_token_ids": [10**6]},
    )
    result = command("plan", write_job_file(tmp_path / "job.yaml", values), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error_type"] == SpecError.__name__


def die(number: int) -> int:
    os._exit(number)


def start(setup: object, stop: Event) -> None:
    """Nothing to do."""


def test_a_worker_that_is_killed_is_an_interruption() -> None:
    with pytest.raises(RunInterrupted, match="was killed"), worker_pool(1, start, None, "it was killed") as pool:
        pool.submit(die, 9).result()


@pytest.mark.slow
def test_a_probe_measures_the_real_engine_and_is_remembered(exaone: Path, tmp_path: Path) -> None:
    values = job_values(exaone, write_input(tmp_path / "in", [200]), tmp_path / "out")
    job_file = write_job_file(tmp_path / "job.yaml", values)
    probed = planned(job_file, "--probe", "--price-per-gpu-hour", "2")
    assert probed["memory"]["engine"] == probed["probe"]["speed"]["engine"] == "continuous"
    assert probed["memory"]["devices"][0]["fits"] is True
    estimate = probed["estimate"]
    assert estimate["basis"]["source"] == "probe"
    assert 0 < estimate["elapsed_s"][0] == estimate["elapsed_s"][1]
    assert estimate["cost"][0] == pytest.approx(2 * estimate["gpu_hours"][0], abs=1e-3)
    assert read_speeds(speeds_file())[-1].job == probed["fingerprint"]
    # The next plan needs no probe.
    again = planned(job_file)["estimate"]
    assert (again["basis"]["source"], again["elapsed_s"]) == ("probe", estimate["elapsed_s"])
