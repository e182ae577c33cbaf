"""Jobs on a real S3 server that goes away: outages, killed processes, and failing calls all at once."""

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs

from batchinfer.audit import verify_deep
from batchinfer.job_file import parse_job
from tests.faults.in_process import one_machine, run_quietly
from tests.faults.runs import CommandRun
from tests.faults.test_chaos import chaos
from tests.jobs import job_values, model_without_weights, read_rows, write_input, write_job_file
from tests.seaweed import BUCKET, S3Server, seaweed_or_skip

OUTPUT = f"s3://{BUCKET}/out"


server = pytest.fixture(seaweed_or_skip)


@pytest.fixture
def job_file(server: S3Server, tmp_path: Path) -> Path:
    """160 rows in 20 units, some 15 seconds for the fake engine; the output alone is on the server."""
    values = job_values(
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", [100, 60]),
        OUTPUT,
        output={"storage_options": server.storage_options},
        engine={"kind": "fake", "fake": {"tokens_per_s": 40.0}},
        execution={"rows_per_unit": 8, "journal_interval_s": 0.5, "lease_timeout_s": 6.0},
    )
    return write_job_file(tmp_path / "job.yaml", values)


@pytest.fixture
def expected(tmp_path: Path, job_file: Path) -> list[tuple[object, ...]]:
    """The rows of an undisturbed run, on the local disk."""
    values = job_values(
        tmp_path / "model", tmp_path / "in", tmp_path / "quiet", engine={"kind": "fake"}, execution={"rows_per_unit": 8}
    )
    with one_machine():
        run_quietly(parse_job(values))
    return read_rows(tmp_path / "quiet")


def rows(server: S3Server) -> list[tuple[object, ...]]:
    """The output's rows, as :func:`tests.jobs.read_rows` gives them, read with pyarrow and s3fs alone."""
    files = s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True)
    table = pq.read_table(f"{BUCKET}/out/completions", filesystem=files)
    names = ("id", "sample", "completion", "finish_reason")
    return sorted(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def num_parts(server: S3Server) -> int:
    files = s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True)
    return len(files.glob(f"{BUCKET}/out/completions/*.parquet"))


def check_complete(server: S3Server, expected: list[tuple[object, ...]]) -> None:
    report = verify_deep(OUTPUT, server.storage_options)
    assert report.verdict == "complete", report.findings
    assert rows(server) == expected


@pytest.mark.slow
def test_a_killed_server_a_killed_replica_and_a_killed_driver(
    server: S3Server, job_file: Path, expected: list[tuple[object, ...]]
) -> None:
    """1. the server is killed and back after seconds: ridden out  2. a replica dies  3. the driver  4. run again."""
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(server) >= 2)
    server.kill()
    time.sleep(2)
    server.start()
    so_far = num_parts(server)
    run.wait_for(lambda: num_parts(server) > so_far)
    run.kill_replica()
    so_far = num_parts(server)
    run.wait_for(lambda: num_parts(server) > so_far)
    run.kill_driver()
    assert num_parts(server) < 20
    assert CommandRun(job_file).wait() == 0
    check_complete(server, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the client library tries each call for seconds by itself, and each is tried six times
def test_a_server_that_stays_away_ends_the_run_with_3_and_a_later_run_completes(
    server: S3Server, job_file: Path, expected: list[tuple[object, ...]]
) -> None:
    run = CommandRun(job_file)
    run.wait_for(lambda: num_parts(server) >= 2)
    server.kill()
    assert run.process.wait(600) == 3
    said = run.log.read_text()
    assert "run the same command again when the storage answers" in said
    server.start()
    assert CommandRun(job_file).wait() == 0
    check_complete(server, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chaos_on_s3(server: S3Server, job_file: Path, expected: list[tuple[object, ...]]) -> None:
    """Driver and replicas killed, one call in twenty failing, the lease stolen."""
    ended = chaos(job_file, "kill-replica=0.05,kill-driver=0.02,fail=0.05,expire-lease=0.01,runs=5", seed=1)
    assert ended.returncode == 0, (job_file.parent / "chaos.log").read_text()[-3000:]
    report = json.loads(ended.stdout)
    assert report["num_driver_kills"] + report["num_replica_kills"] >= 2
    check_complete(server, expected)
