"""The commands on one job from its plan to its proof, as a user types them; once as a process of its own."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.jobs import command, job_values, model_without_weights, write_input, write_job_file

NUM_ROWS = 60


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job over the fake engine: two shards, five units, two samples per row."""
    values = job_values(
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", [40, 20]),
        tmp_path / "out",
        engine={"kind": "fake"},
        sampling={"n": 2, "temperature": 1.0},
    )
    return write_job_file(tmp_path / "job.yaml", values)


@pytest.mark.usefixtures("ray_session")
def test_a_job_from_its_plan_to_its_proof(job_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan = command("plan", job_file, "--sample", "0")
    assert plan.exit_code == 0
    assert "begins a new output" in plan.stdout
    assert command("status", output).exit_code == 2
    assert command("verify", output).exit_code == 2

    run = command("run", job_file)
    assert run.exit_code == 0, run.output
    assert "every row is committed" in run.stdout
    assert f"{NUM_ROWS} of {NUM_ROWS}" in run.stdout
    # Logs and progress go to stderr, with the replica's start among them.
    assert "is ready on" in run.stderr
    assert "is ready on" not in run.stdout

    status = json.loads(command("status", output, "--json").stdout)
    assert (status["state"], status["num_rows_committed"], status["holder"]) == ("complete", NUM_ROWS, None)
    assert status["last_run"]["num_units_committed"] == 5
    verdict = json.loads(command("verify", output, "--json").stdout)
    assert (verdict["verdict"], verdict["num_completions"]) == ("complete", 2 * NUM_ROWS)
    shown = command("show", output, "-n", "2")
    assert shown.exit_code == 0
    assert "0: " in shown.stdout
    # The product is a data set for any reader of Parquet.
    assert ds.dataset(output / "completions").count_rows() == 2 * NUM_ROWS

    again = command("run", job_file)
    assert again.exit_code == 0
    assert f"everything is committed already: {NUM_ROWS} rows in 5 units" in again.stdout
    assert json.loads(command("plan", job_file, "--json").stdout)["num_rows_pending"] == 0


@pytest.mark.usefixtures("ray_session")
def test_a_grown_folder_runs_its_new_rows_alone(job_file: Path, tmp_path: Path) -> None:
    assert command("run", job_file, "--json").exit_code == 0
    pq.write_table(pa.table({"id": [1000], "prompt": ["one more"]}), tmp_path / "in" / "part-7.parquet")
    grown = command("run", job_file, "--json")
    written = json.loads(grown.stdout)
    assert (grown.exit_code, written["outcome"]) == (0, "complete")
    assert (written["num_rows"], written["num_rows_committed_before"], written["num_completions"]) == (61, 60, 2)
    assert command("verify", tmp_path / "out").exit_code == 0


@pytest.mark.usefixtures("ray_session")
def test_a_job_that_cannot_finish_ends_with_3_and_says_what_is_left(job_file: Path, tmp_path: Path) -> None:
    """Every step of this engine fails, so every replica dies."""
    run = command("run", job_file, "--json", "--set", "engine.fake.error_rate=1.0", "--set", "execution.max_attempts=1")
    assert run.exit_code == 3, run.output
    assert json.loads(run.stdout)["exit_code"] == 3
    status = json.loads(command("status", tmp_path / "out", "--json").stdout)
    assert (status["state"], status["num_rows_committed"]) == ("unfinished", 0)
    assert status["last_run"]["num_replicas_died"] > 0
    assert command("verify", tmp_path / "out").exit_code == 3
    # The same output, the same job, a working engine.
    assert command("run", job_file).exit_code == 0


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes that inherited the environment of one we started."""
    found = []
    for each in psutil.process_iter():
        try:
            if each.environ().get("BATCHINFER_TEST_MARK") == mark and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.Error:
            continue
    return found


def test_as_a_process_of_its_own_it_prints_one_json_object_and_leaves_nothing_running(
    job_file: Path, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    ended = subprocess.run(
        [sys.executable, "-m", "batchinfer", "run", str(job_file), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "BATCHINFER_TEST_MARK": mark},
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["num_rows_committed"] == NUM_ROWS
    assert "starting Ray inside this process" in ended.stderr
    assert "Traceback" not in ended.stderr
    _, alive = psutil.wait_procs(marked_processes(mark), timeout=20)
    assert alive == []
    assert not (tmp_path / "out" / "_job" / "lease.json").exists()
