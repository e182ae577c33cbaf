"""Two drivers on one output: one works, the other is told who does; whoever loses the lease stops before it harms."""

import json
import re
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.audit import verify
from batchinfer.storage.events import read_events
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.lease import read_lease
from batchinfer.storage.location import Location
from tests.faults.runs import CommandRun
from tests.jobs import job, job_values, model_without_weights, read_rows, write_input, write_job_file
from tests.seaweed import BUCKET, seaweed_or_skip

pytestmark = pytest.mark.usefixtures("ray_session")

#: Of their leases: a beat every third of a second.
LEASE_TIMEOUT_S = 2.0
#: Tokens a second with which the 40 rows take longer than the other drivers need to start.
SLOW = 6.0


@dataclass
class Output:
    """One output, and the drivers that are sent at it, each with a job file and a log of its own."""

    directory: Path
    uri: str
    options: StorageOptions

    @property
    def location(self) -> Location:
        return locate(self.uri, self.options)

    def driver(self, name: str, *options: str, tokens_per_s: float | None = None) -> CommandRun:
        return CommandRun(self._job_file(name, tokens_per_s), *options)

    def _job_file(self, name: str, tokens_per_s: float | None) -> Path:
        (self.directory / name).mkdir()
        values = job_values(
            self.directory / "model",
            self.directory / "in",
            self.uri,
            output={"storage_options": dict(self.options)},
            # Room for a few units only: a replica without its driver soon has nothing to do.
            engine={"kind": "fake", "max_batch_rows": 4, "fake": {"tokens_per_s": tokens_per_s}},
            execution={"rows_per_unit": 4, "lease_timeout_s": LEASE_TIMEOUT_S, "journal_interval_s": 0.5},
        )
        return write_job_file(self.directory / name / "job.yaml", values)

    def num_parts(self) -> int:
        return len(self.location.child("completions").names())

    def num_leased(self, run_id: str, since: datetime) -> int:
        """Units that a run has given to its replicas since a moment, by its own account."""
        names = [name for name in self.location.child("_job/runs").names() if name.startswith(run_id)]
        lines = b"".join(self.location.child(f"_job/runs/{name}").read_bytes() for name in sorted(names)).splitlines()
        leased = [event for event in map(json.loads, lines) if event["event"] == "unit_leased"]
        return sum(datetime.fromisoformat(event["at"]) > since for event in leased)

    def holder(self) -> str:
        record = read_lease(self.location)
        assert record is not None
        return record.run_id

    def check(self) -> None:
        """Complete, and row by row what a driver without company makes."""
        report = verify(self.uri, self.options)
        assert report.verdict == "complete", report.findings
        directory = self.location.child("completions")
        tables = [pq.read_table(pa.BufferReader(directory.child(name).read_bytes())) for name in directory.names()]
        columns = ("id", "sample", "completion", "finish_reason")
        table = pa.concat_tables(tables).select(columns)
        rows = sorted(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
        quiet = job(self.directory / "model", self.directory / "in", self.directory / "quiet", engine={"kind": "fake"})
        batchinfer.run(quiet)
        assert rows == read_rows(self.directory / "quiet")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Output]:
    model_without_weights(tmp_path / "model")
    write_input(tmp_path / "in", [40])
    if request.param == "local":
        yield Output(tmp_path, str(tmp_path / "out"), {})
        return
    for server in seaweed_or_skip():
        yield Output(tmp_path, f"s3://{BUCKET}/{uuid.uuid4().hex}", server.storage_options)


def test_a_second_driver_is_refused_until_it_takes_over(output: Output) -> None:
    """1. a driver works  2. a second one is refused  3. a third takes over, and the first one stops by itself."""
    first = output.driver("first", tokens_per_s=SLOW)
    first.wait_for(lambda: output.num_parts() >= 1)
    first_run = output.holder()
    second = output.driver("second")
    assert second.wait() == 3
    told = second.log.read_text()
    process = psutil.Process(first.process.pid)
    assert re.search(rf"held by run {first_run} \(host \S+, process {process.pid}, started \S+, last heartbeat ", told)
    assert "--takeover" in told
    assert first.process.poll() is None

    third = output.driver("third", "--takeover")
    third.wait_for(lambda: output.holder() != first_run)
    taken_s, third_run = time.monotonic(), output.holder()
    assert first.wait() == 3
    # A beat, then leaving Ray, on a machine that starts another one just now.
    assert time.monotonic() - taken_s < 15.0
    assert f"taken over by run {third_run} " in first.log.read_text()
    assert third.wait() == 0, third.log.read_text()
    output.check()


@pytest.mark.slow
def test_a_driver_that_was_stopped_for_too_long_does_nothing_more_when_it_wakes(output: Output) -> None:
    """1. SIGSTOP for a driver, not for its replica  2. its lease goes stale and is taken over  3. SIGCONT."""
    zombie = output.driver("zombie", tokens_per_s=SLOW)
    zombie.wait_for(lambda: output.num_parts() >= 1)
    zombie_run = output.holder()
    zombie.process.send_signal(signal.SIGSTOP)
    stopped_at = datetime.now(UTC)
    try:
        time.sleep(1.5 * LEASE_TIMEOUT_S)
        successor = output.driver("successor")
        successor.wait_for(lambda: output.holder() != zombie_run)
    finally:
        zombie.process.send_signal(signal.SIGCONT)
    assert zombie.wait() == 3
    assert "taken over by run " in zombie.log.read_text()
    # Events from before the stop may be put only now: on an object store they are gathered for seconds.
    assert output.num_leased(zombie_run, stopped_at) == 0
    assert successor.wait() == 0, successor.log.read_text()
    assert [event["event"] for event in read_events(output.location)].count("run_finished") == 1
    output.check()
