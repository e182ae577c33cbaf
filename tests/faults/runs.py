"""`batchinfer run` as a process of its own, watched and killed, and what its output is compared with."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil
import yaml

from batchinfer.audit import verify
from batchinfer.fingerprint import redacted_spec
from tests.jobs import job, read_rows

#: How long anything may take before the test calls it hung.
PATIENCE_S = 120.0


class CommandRun:
    """`batchinfer run` as a process of its own, with a Ray of its own."""

    #: Of the test under way; what it leaves running is ended by the fixture in conftest.
    of_test: ClassVar[list["CommandRun"]] = []

    def __init__(self, job_file: Path, *options: str) -> None:
        self.log = job_file.parent / "run.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "batchinfer", "run", str(job_file), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.of_test.append(self)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before it happened"
            assert time.monotonic() < until, "it never happened"
            time.sleep(0.02)

    def kill_driver(self) -> None:
        """SIGKILL the driver; returns when its replicas are gone too, as they are seconds later by themselves."""
        replicas = self.replicas()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        until = time.monotonic() + PATIENCE_S
        while not ended(replicas):
            assert time.monotonic() < until, "a replica outlived its driver"
            time.sleep(0.05)

    def end(self) -> None:
        """SIGKILL it and its children if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def kill_replica(self) -> int:
        replicas = self.replicas()
        assert replicas, "no replica is running"
        replicas[0].kill()
        return replicas[0].pid

    def replicas(self) -> list[psutil.Process]:
        return [child for child in self.descendants() if "ray::Replica" in _command_line(child)]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ended(processes: list[psutil.Process]) -> bool:
    return not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def num_parts(output: Path) -> int:
    return len(list((output / "completions").glob("*.parquet"))) if (output / "completions").is_dir() else 0


def write_job(tmp_path: Path, exaone: Path, **blocks: dict[str, object]) -> Path:
    spec = job(exaone, tmp_path / "in", tmp_path / "out", **blocks)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(redacted_spec(spec)))
    return tmp_path / "job.yaml"


#: 160 rows come to about 600 tokens: some 15 seconds, in 21 units.
SLOW_FAKE: dict[str, object] = {"kind": "fake", "fake": {"tokens_per_s": 40.0}}


def check_complete(output: Path, rows: list[tuple[object, ...]]) -> None:
    report = verify(str(output))
    assert report.verdict == "complete", report.findings
    assert read_rows(output) == rows


def quiet_rows(job_file: Path, output: Path) -> list[tuple[object, ...]]:
    """Rows of an undisturbed run of a job file, into another output and as fast as the fake engine goes."""
    values = yaml.safe_load(job_file.read_text())
    values["output"] = {**values["output"], "path": str(output), "storage_options": {}}
    values["engine"]["fake"] = {}
    quiet = job_file.parent / "quiet.yaml"
    quiet.write_text(yaml.safe_dump(values))
    assert CommandRun(quiet).wait() == 0
    return read_rows(output)
