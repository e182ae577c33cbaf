"""``batchinfer submit`` against a real head with its dashboard: the job runs there, its exit code comes back here."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import job_values, model_without_weights, read_rows, write_input, write_job_file
from tests.ray_head import environment, ray_head

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef" * 4
NUM_ROWS = 40


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with ray_head(TOKEN) as url:
        yield url


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    values = job_values(
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", [NUM_ROWS]),
        tmp_path / "out",
        engine={"kind": "fake"},
        sampling={"ignore_eos": True},
        execution={"rows_per_unit": 8},
    )
    return write_job_file(tmp_path / "job.yaml", values)


def submit(job_file: Path, url: str, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "batchinfer", "submit", str(job_file), "--address", url, *arguments],
        env=environment(TOKEN) | changes,
        capture_output=True,
        text=True,
        timeout=200,
    )


def ray_job(url: str, verb: str, submission_id: str) -> str:
    """What `submit` tells its user to type."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", url, submission_id]
    return subprocess.run(command, env=environment(TOKEN), capture_output=True, text=True, timeout=100).stdout


def test_a_submitted_job_is_run_by_the_cluster_and_waited_for(tmp_path: Path, job_file: Path, head: str) -> None:
    ended = submit(job_file, head, "--wait", "--set", "sampling.max_new_tokens=5")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every row is committed" in ended.stdout
    assert "Warning: output.path" in ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    assert len(read_rows(tmp_path / "out")) == NUM_ROWS


def test_the_exit_codes_of_the_run_come_back(tmp_path: Path, job_file: Path, head: str) -> None:
    """2 from a quality limit, found by the cluster, and 1 from dead letters: Ray itself calls both FAILED."""
    poor = submit(
        job_file, head, "--wait", "--json", "--set", "quality.max_truncated=0.1", "--set", "quality.min_rows=8"
    )
    assert poor.returncode == 2, poor.stderr
    assert json.loads(poor.stdout)["exit_code"] == 2
    assert "quality.max_truncated" in poor.stderr
    dead = submit(
        job_file, head, "--wait", "--set", f"output.path={tmp_path / 'dead'}", "--set", "model.max_model_len=40"
    )
    assert dead.returncode == 1, dead.stderr


def test_a_job_that_is_stopped_drains(tmp_path: Path, job_file: Path, head: str) -> None:
    """The signal of `ray job stop` reaches the run through the shell that Ray starts it with, and is given its time."""
    slow = ("--set", "engine.fake.tokens_per_s=30", "--set", "execution.rows_per_unit=1000")
    submission_id = submit(job_file, head, *slow).stdout.strip()
    until_s = time.monotonic() + 60
    while "is ready" not in (log := ray_job(head, "logs", submission_id)):
        assert time.monotonic() < until_s, log
    ray_job(head, "stop", submission_id)
    log = ray_job(head, "logs", submission_id)
    assert "run the same command again to continue" in log
    assert list((tmp_path / "out" / "_job" / "journal").rglob("*.arrow"))


def test_another_token_is_refused_and_says_what_to_set(job_file: Path, head: str) -> None:
    refused = submit(job_file, head, RAY_AUTH_TOKEN="f" * 64)
    assert refused.returncode == 3
    assert "RAY_AUTH_TOKEN" in refused.stderr
