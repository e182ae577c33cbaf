"""Clusters that change under a job: nodes join, get notice, vanish; the head itself vanishes."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from batchinfer.audit import verify
from tests.faults.runs import CommandRun, num_parts, quiet_rows
from tests.jobs import job_values, model_without_weights, read_rows, write_input, write_job_file
from tests.ray_nodes import ON_LOOPBACK, RayNodes, ray_nodes

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    for name, value in ON_LOOPBACK.items():
        monkeypatch.setenv(name, value)
    with ray_nodes() as cluster:
        yield cluster


def job_file(tmp_path: Path, address: str | None, num_rows: int, tokens_per_s: float) -> Path:
    model_without_weights(tmp_path / "model")
    write_input(tmp_path / "in", [num_rows])
    values = job_values(
        tmp_path / "model",
        tmp_path / "in",
        tmp_path / "out",
        engine={"kind": "fake", "max_batch_rows": 8, "fake": {"tokens_per_s": tokens_per_s}},
        execution={"rows_per_unit": 4, "journal_interval_s": 0.5},
        cluster={"address": address},
    )
    return write_job_file(tmp_path / "job.yaml", values)


def alone(tmp_path: Path) -> Path:
    """The same job without the cluster, and as fast as the fake engine goes."""
    values = yaml.safe_load((tmp_path / "job.yaml").read_text())
    (tmp_path / "alone").mkdir()
    return write_job_file(
        tmp_path / "alone" / "job.yaml", {**values, "cluster": {"num_cpus": 1}, "engine": {"kind": "fake"}}
    )


def events(output: Path) -> list[dict[str, object]]:
    lines = b"".join(path.read_bytes() for path in sorted((output / "_job" / "runs").glob("*"))).splitlines()
    return [json.loads(line) for line in lines]


def committing_replicas(output: Path) -> Counter[object]:
    if not (output / "_job" / "runs").is_dir():
        return Counter()
    return Counter(event["replica"] for event in events(output) if event["event"] == "unit_committed")


def test_nodes_join_get_notice_and_vanish_while_a_job_runs(tmp_path: Path, nodes: RayNodes) -> None:
    """1. one node  2. a second joins  3. the first gets notice  4. a third joins  5. the second vanishes."""
    output = tmp_path / "out"
    first = nodes.add()
    run = CommandRun(job_file(tmp_path, nodes.address, num_rows=320, tokens_per_s=12.0))
    run.wait_for(lambda: committing_replicas(output)[0] >= 1)
    second = nodes.add()
    run.wait_for(lambda: committing_replicas(output)[1] >= 1)

    nodes.give_notice(first)
    run.wait_for(lambda: any(event["event"] == "replica_drained" for event in events(output)))
    (drained,) = (event for event in events(output) if event["event"] == "replica_drained")
    assert drained["replica"] == 0

    nodes.add()
    run.wait_for(lambda: committing_replicas(output).keys() - {0, 1} != set())
    nodes.kill(second)
    assert run.wait() == 0, run.log.read_text()

    died = [event for event in events(output) if event["event"] == "replica_died"]
    assert [(event["replica"], event["blameless"]) for event in died] == [(1, True)], died
    # What the drained replica had begun went on elsewhere, from its journal.
    resumed = [event["num_resumed_tokens"] for event in events(output) if event["event"] == "unit_committed"]
    assert any(resumed)
    assert verify(str(output)).verdict == "complete"
    assert read_rows(output) == quiet_rows(alone(tmp_path), tmp_path / "quiet")


def test_a_job_without_its_head_ends_with_3_within_a_minute_and_goes_on_elsewhere(
    tmp_path: Path, nodes: RayNodes
) -> None:
    output = tmp_path / "out"
    nodes.add()
    run = CommandRun(job_file(tmp_path, nodes.address, num_rows=400, tokens_per_s=8.0))
    run.wait_for(lambda: num_parts(output) >= 1)
    nodes.kill_head()
    lost_s = time.monotonic()
    assert run.wait() == 3
    assert time.monotonic() - lost_s < 60.0
    assert "the head of the Ray cluster at" in run.log.read_text()
    assert "run again" in run.log.read_text()

    elsewhere = alone(tmp_path)
    assert CommandRun(elsewhere).wait() == 0
    assert verify(str(output)).verdict == "complete"
    assert read_rows(output) == quiet_rows(elsewhere, tmp_path / "quiet")
