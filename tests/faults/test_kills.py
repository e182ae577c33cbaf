"""Processes killed with SIGKILL at several moments: the next run continues, and the rows are those of a quiet run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from batchinfer.audit import verify
from batchinfer.fingerprint import redacted_spec
from tests.jobs import job, read_rows, write_input

#: How long anything may take before the test calls it hung.
PATIENCE_S = 120.0


class CommandRun:
    """`batchinfer run` as a process of its own, with a Ray of its own."""

    def __init__(self, job_file: Path) -> None:
        with (job_file.parent / "run.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "batchinfer", "run", str(job_file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

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
        while not _ended(replicas):
            assert time.monotonic() < until, "a replica outlived its driver"
            time.sleep(0.05)

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


def _ended(processes: list[psutil.Process]) -> bool:
    return not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _num_parts(output: Path) -> int:
    return len(list((output / "completions").glob("*.parquet"))) if (output / "completions").is_dir() else 0


def _write_job(tmp_path: Path, exaone: Path, **blocks: dict[str, object]) -> Path:
    spec = job(exaone, tmp_path / "in", tmp_path / "out", **blocks)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(redacted_spec(spec)))
    return tmp_path / "job.yaml"


#: 160 rows come to about 600 tokens: some 15 seconds, in 21 units.
SLOW_FAKE: dict[str, object] = {"kind": "fake", "fake": {"tokens_per_s": 40.0}}


@pytest.fixture
def expected(tmp_path: Path, exaone: Path) -> Callable[[Path], list[tuple[object, ...]]]:
    """Rows of an undisturbed run of a job file, into another output and as fast as the fake engine goes."""

    def run_quietly(job_file: Path) -> list[tuple[object, ...]]:
        values = yaml.safe_load(job_file.read_text())
        values["output"]["path"] = str(tmp_path / "quiet")
        values["engine"]["fake"] = {}
        quiet = tmp_path / "quiet.yaml"
        quiet.write_text(yaml.safe_dump(values))
        assert CommandRun(quiet).wait() == 0
        return read_rows(tmp_path / "quiet")

    return run_quietly


def _check_complete(output: Path, rows: list[tuple[object, ...]]) -> None:
    report = verify(str(output))
    assert report.verdict == "complete", report.findings
    assert read_rows(output) == rows


def test_a_driver_killed_at_several_moments_is_continued_by_the_next_run(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """Killed while Ray starts, at the first commit, and twice in the middle."""
    write_input(tmp_path / "in", [100, 60])
    output = tmp_path / "out"
    job_file = _write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    moments: list[Callable[[], bool]] = [
        lambda: (output / "_job" / "lease.json").exists(),
        lambda: _num_parts(output) >= 1,
        lambda: _num_parts(output) >= 6,
        lambda: _num_parts(output) >= 12,
    ]
    for happened in moments:
        run = CommandRun(job_file)
        run.wait_for(happened)
        run.kill_driver()
    assert _num_parts(output) < 21
    assert verify(str(output)).verdict == "incomplete"
    assert CommandRun(job_file).wait() == 0
    _check_complete(output, expected(job_file))


def test_killed_replicas_are_replaced_within_the_run(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """1. the first replica dies after the first commit  2. its successor dies in the middle  3. the run ends with 0."""
    write_input(tmp_path / "in", [100, 60])
    output = tmp_path / "out"
    job_file = _write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    run = CommandRun(job_file)
    run.wait_for(lambda: _num_parts(output) >= 1)
    first = run.kill_replica()
    run.wait_for(lambda: any(process.pid != first for process in run.replicas()) and _num_parts(output) >= 8)
    run.kill_replica()
    assert run.wait() == 0
    _check_complete(output, expected(job_file))
    (log,) = (output / "_job" / "runs").iterdir()
    kinds = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert kinds.count("replica_died") == 2


def test_a_real_model_killed_in_the_middle_continues_with_the_same_rows(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """A replica, then the driver, while sampled rows of a tiny EXAONE are generated one unit after the other."""
    write_input(tmp_path / "in", [36])
    output = tmp_path / "out"
    job_file = _write_job(
        tmp_path,
        exaone,
        sampling={"max_new_tokens": 16, "temperature": 0.9, "seed": 3, "ignore_eos": True},
        engine={"kind": "padded", "max_batch_rows": 2},
        execution={"rows_per_unit": 4},
    )
    run = CommandRun(job_file)
    run.wait_for(lambda: _num_parts(output) >= 2)
    run.kill_replica()
    run.wait_for(lambda: _num_parts(output) >= 5)
    run.kill_driver()
    assert CommandRun(job_file).wait() == 0
    _check_complete(output, expected(job_file))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_3_and_leaves_nothing_running(
    tmp_path: Path, exaone: Path, number: signal.Signals
) -> None:
    write_input(tmp_path / "in", [160])
    output = tmp_path / "out"
    job_file = _write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    run = CommandRun(job_file)
    run.wait_for(lambda: _num_parts(output) >= 1)
    children = run.descendants()
    run.process.send_signal(number)
    asked_s = time.monotonic()
    assert run.wait() == 3
    assert time.monotonic() - asked_s < 10
    assert _ended(children)
    assert not (output / "_job" / "lease.json").exists()
    assert verify(str(output)).verdict == "incomplete"
