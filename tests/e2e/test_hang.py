"""A replica that stops in its tracks, as one whose GPU hangs does: it is killed and replaced, the job goes on."""

import json
from pathlib import Path

import pytest

from batchinfer.audit import verify
from tests.faults.runs import CommandRun, ended, num_parts, write_job
from tests.jobs import write_input


@pytest.mark.slow
def test_a_replica_without_a_sign_of_life_is_killed_and_replaced(tmp_path: Path, exaone: Path) -> None:
    write_input(tmp_path / "in", [60])
    output = tmp_path / "out"
    run = CommandRun(
        write_job(
            tmp_path,
            exaone,
            engine={"kind": "fake", "max_batch_rows": 8, "fake": {"tokens_per_s": 25.0}},
            execution={"rows_per_unit": 4, "hang_timeout_s": 3.0, "journal_interval_s": 0.5},
        )
    )
    run.wait_for(lambda: num_parts(output) >= 2)
    (stuck,) = run.replicas()
    stuck.suspend()
    try:
        assert run.wait() == 0, run.log.read_text()
        assert ended([stuck]), "it would hold its GPU for ever"
    finally:
        if not ended([stuck]):
            stuck.kill()
    (log,) = (output / "_job" / "runs").iterdir()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    stopped = [event for event in events if event["event"] == "replica_stopped" and event["error"]]
    assert [event["replica"] for event in stopped] == [0]
    assert "no sign of life for 3 s" in stopped[0]["error"]
    assert verify(str(output)).verdict == "complete"
