"""A cluster started as docker/ starts it lets nobody in without its token, and the refusal says what to do."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs import job_values, model_without_weights, read_rows, write_input, write_job_file

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef" * 4
NUM_ROWS = 20
START_TIMEOUT_S = 90.0


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return clean | {"RAY_USAGE_STATS_ENABLED": "0"} | changes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """``host:port`` of a head on loopback that asks for TOKEN."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="bi-", ignore_cleanup_errors=True) as directory:
        log = Path(directory) / "printed"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [
                    *(
                        sys.executable,
                        "-m",
                        "ray.scripts.scripts",
                        "start",
                        "--head",
                        "--block",
                        "--num-cpus=2",
                        "--num-gpus=0",
                    ),
                    *(f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={directory}"),
                    *(f"--ray-client-server-port={free_port()}", "--include-dashboard=false"),
                    "--object-store-memory=100000000",
                ],
                env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        try:
            until_s = time.monotonic() + START_TIMEOUT_S
            while not accepts(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until_s, "the head did not start"
                time.sleep(0.2)
            yield address
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            psutil.wait_procs(below, timeout=10)
            for left in below:
                if left.is_running():
                    left.kill()
            process.kill()
            process.wait(10)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_job(directory: Path, address: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    values = job_values(
        model_without_weights(directory / "model"),
        write_input(directory / "in", [NUM_ROWS]),
        directory / "out",
        engine={"kind": "fake"},
        cluster={"address": address},
    )
    job_file = write_job_file(directory / "job.yaml", values)
    return subprocess.run(
        [sys.executable, "-m", "batchinfer", "run", str(job_file)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_with_the_token_a_job_runs(head: str, tmp_path: Path) -> None:
    ended = run_job(tmp_path, head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert ended.returncode == 0, ended.stderr
    assert len(read_rows(tmp_path / "out")) == NUM_ROWS
    assert TOKEN not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "changes",
    [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "token"}],
    ids=["no token", "another token", "no token, mode set"],
)
def test_without_it_nothing_runs_and_the_error_says_what_to_set(
    head: str, tmp_path: Path, changes: dict[str, str]
) -> None:
    ended = run_job(tmp_path, head, **changes, HOME=str(tmp_path))
    assert ended.returncode == 3, ended.stderr
    assert "RAY_AUTH_TOKEN" in ended.stderr
    assert not (tmp_path / "out" / "completions").exists()
    assert TOKEN not in ended.stdout + ended.stderr
