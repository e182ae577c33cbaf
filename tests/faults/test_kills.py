"""Processes killed with SIGKILL at several moments: the next run continues, and the rows are those of a quiet run."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batchinfer.audit import verify
from tests.faults.runs import SLOW_FAKE, CommandRun, check_complete, ended, num_parts, quiet_rows, write_job
from tests.jobs import write_input


@pytest.fixture
def expected(tmp_path: Path) -> Callable[[Path], list[tuple[object, ...]]]:
    """Rows of an undisturbed run of a job file."""
    return lambda job_file: quiet_rows(job_file, tmp_path / "quiet")


def test_a_driver_killed_at_several_moments_is_continued_by_the_next_run(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """Killed while Ray starts, and in the middle."""
    write_input(tmp_path / "in", [50, 30])
    output = tmp_path / "out"
    job_file = write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    moments: list[Callable[[], bool]] = [
        lambda: (output / "_job" / "lease.json").exists(),
        lambda: num_parts(output) >= 3,
    ]
    for happened in moments:
        run = CommandRun(job_file)
        run.wait_for(happened)
        run.kill_driver()
    assert num_parts(output) < 11
    assert verify(str(output)).verdict == "incomplete"
    assert CommandRun(job_file).wait() == 0
    check_complete(output, expected(job_file))


@pytest.mark.slow
def test_killed_replicas_are_replaced_within_the_run(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """1. the first replica dies after the first commit  2. its successor dies in the middle  3. the run ends with 0."""
    write_input(tmp_path / "in", [100, 60])
    output = tmp_path / "out"
    job_file = write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(output) >= 1)
    first = run.kill_replica()
    run.wait_for(lambda: any(process.pid != first for process in run.replicas()) and num_parts(output) >= 8)
    run.kill_replica()
    assert run.wait() == 0
    check_complete(output, expected(job_file))
    (log,) = (output / "_job" / "runs").iterdir()
    kinds = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert kinds.count("replica_died") == 2


@pytest.mark.slow
def test_a_real_model_killed_in_the_middle_continues_with_the_same_rows(
    tmp_path: Path, exaone: Path, expected: Callable[[Path], list[tuple[object, ...]]]
) -> None:
    """A replica, then the driver, while sampled rows of a tiny EXAONE are generated one unit after the other."""
    write_input(tmp_path / "in", [36])
    output = tmp_path / "out"
    job_file = write_job(
        tmp_path,
        exaone,
        sampling={"max_new_tokens": 16, "temperature": 0.9, "seed": 3, "ignore_eos": True},
        engine={"kind": "padded", "max_batch_rows": 2},
        execution={"rows_per_unit": 4},
    )
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(output) >= 2)
    run.kill_replica()
    run.wait_for(lambda: num_parts(output) >= 5)
    run.kill_driver()
    assert CommandRun(job_file).wait() == 0
    check_complete(output, expected(job_file))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_3_and_leaves_nothing_running(
    tmp_path: Path, exaone: Path, number: signal.Signals
) -> None:
    write_input(tmp_path / "in", [160])
    output = tmp_path / "out"
    job_file = write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8})
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(output) >= 1)
    children = run.descendants()
    run.process.send_signal(number)
    asked_s = time.monotonic()
    assert run.wait() == 3
    assert time.monotonic() - asked_s < 10
    assert ended(children)
    assert not (output / "_job" / "lease.json").exists()
    assert verify(str(output)).verdict == "incomplete"
