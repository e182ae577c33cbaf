"""An output on a disk that is full, or that cannot be written at all: said clearly, nothing lost, continued later."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from batchinfer.audit import verify
from batchinfer.errors import StorageUnavailable
from batchinfer.fingerprint import redacted_spec
from batchinfer.job_file import load_job, parse_job
from tests.faults.in_process import one_machine, run_quietly
from tests.faults.runs import CommandRun, check_complete, num_parts
from tests.jobs import command, job, job_values, model_without_weights, read_rows, write_input

DISK_BYTES = 4 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.fixture
def job_file(tmp_path: Path, disk: Path) -> Path:
    """160 rows in 20 units; some seconds for the fake engine."""
    spec = job(
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", [100, 60]),
        disk / "out",
        engine={"kind": "fake", "fake": {"tokens_per_s": 150.0}},
        execution={"rows_per_unit": 8, "journal_interval_s": 0.5},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(redacted_spec(spec)))
    return tmp_path / "job.yaml"


def expected_rows(tmp_path: Path) -> list[tuple[object, ...]]:
    values = job_values(tmp_path / "model", tmp_path / "in", tmp_path / "quiet", engine={"kind": "fake"})
    with one_machine():
        run_quietly(parse_job(values))
    return read_rows(tmp_path / "quiet")


def free_bytes(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_a_disk_that_fills_up_ends_the_run_and_freed_it_is_continued(
    tmp_path: Path, disk: Path, job_file: Path
) -> None:
    """1. room for some units: no space left  2. still full: the same  3. freed: complete"""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free_bytes(disk) - 80 * 1024))
    spec = load_job(job_file, ["engine.fake.tokens_per_s=null"])
    with one_machine():
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match=rf"{disk}/out/.*: no space left .*; free some") as caught:
                run_quietly(spec)
            assert caught.value.exit_code == 3
            assert verify(str(disk / "out")).verdict == "incomplete"
        assert 0 < num_parts(disk / "out") < 20
        ballast.unlink()
        run_quietly(spec)
    check_complete(disk / "out", expected_rows(tmp_path))


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_3_and_freed_it_is_continued(
    tmp_path: Path, disk: Path, job_file: Path
) -> None:
    """1. it fills after the first commits: 3, the way out is said  2. still full: the same  3. freed: complete"""
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(disk / "out") >= 3)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free_bytes(disk)))
    assert run.wait() == 3
    said = run.log.read_text()
    assert "no space left" in said
    assert "free some" in said
    so_far = num_parts(disk / "out")
    assert 3 <= so_far < 20
    assert verify(str(disk / "out")).verdict == "incomplete"

    again = command("run", job_file)
    assert again.exit_code == 3, again.output
    assert "no space left" in again.output
    assert num_parts(disk / "out") == so_far

    ballast.unlink()
    assert CommandRun(job_file).wait() == 0
    check_complete(disk / "out", expected_rows(tmp_path))


def test_a_read_only_output_is_refused_before_anything_is_started(disk: Path, job_file: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused = command("run", job_file)
    assert refused.exit_code == 2, refused.output
    assert f"{disk}/out" in refused.output
    assert "access refused" in refused.output
    assert "check its permissions" in refused.output
    assert not (disk / "out").exists()
