"""Jobs interrupted in the middle of long units: what was journaled is not generated again, the rows are the same."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

import batchinfer
from batchinfer.errors import RunInterrupted
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import JournaledSequence, journaled_units, read_journal
from tests.faults.runs import PATIENCE_S, CommandRun, check_complete, write_job
from tests.jobs import job, read_rows, write_input

#: Two units, which a replica holds at once, journaled several times a second.
EXECUTION: dict[str, object] = {"rows_per_unit": 6, "journal_interval_s": 0.3}
NUM_ROWS = 12
#: So many that a unit of a tiny real model is nowhere near its end when it is interrupted, on a fast machine too.
MAX_NEW_TOKENS = 400


class Watched:
    """The journals of a job's units, as they are on disk."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._location = locate(str(output))

    def sequences(self) -> list[JournaledSequence]:
        if not (self._output / "_job" / "job.json").exists():
            return []
        # Whatever the job's fingerprint is: that of its output.
        fingerprint = json.loads((self._output / "_job" / "job.json").read_text())["fingerprint"]
        return [
            sequence
            for unit_id in sorted(journaled_units(self._location))
            for sequence in read_journal(self._location, unit_id, fingerprint).sequences.values()
        ]

    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences())

    def num_partial(self) -> int:
        return sum(not sequence.has_ended for sequence in self.sequences())

    def last_flush_s(self) -> float:
        """When the newest segment appeared."""
        return max(path.stat().st_mtime for path in (self._output / "_job" / "journal").rglob("*.arrow"))

    def num_resumed_tokens(self) -> int:
        """Tokens that the units' last holders took from the journals, by the last run's own account."""
        log = max((self._output / "_job" / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        committed = [event for event in events if event["event"] == "unit_committed"]
        assert len(committed) == 2
        return sum(int(event["num_resumed_tokens"]) for event in committed)

    def is_gone(self) -> bool:
        return journaled_units(self._location) == set()


def wait_for(happened: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.02)


def kill_replicas() -> None:
    """SIGKILL every replica of this process's Ray."""
    num_killed = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Replica" in " ".join(process.cmdline()):
                process.kill()
                num_killed += 1
    assert num_killed


def test_a_killed_replica_and_a_killed_driver_lose_no_journaled_token(
    tmp_path: Path, exaone: Path, ray_session: None
) -> None:
    """1. the replica dies in the middle of its units  2. its successor goes on, the driver dies  3. the next run"""
    write_input(tmp_path / "in", [NUM_ROWS])
    blocks: dict[str, dict[str, object]] = {
        "sampling": {"max_new_tokens": 300, "ignore_eos": True, "n": 6, "temperature": 1.0},
        "engine": {"kind": "fake", "fake": {"tokens_per_s": 1000.0}},
        "execution": EXECUTION,
    }
    batchinfer.run(job(exaone, tmp_path / "in", tmp_path / "quiet", **{**blocks, "engine": {"kind": "fake"}}))
    watched = Watched(tmp_path / "out")
    job_file = write_job(tmp_path, exaone, **blocks)

    run = CommandRun(job_file)
    run.wait_for(lambda: watched.num_tokens() >= 1000)
    killed_s = time.time()
    run.kill_replica()
    at_first_kill = watched.num_tokens()
    # A busy machine may take a moment to write a segment; the interval itself is a third of a second.
    assert killed_s - watched.last_flush_s() < 0.3 + 1.0
    run.wait_for(lambda: watched.num_tokens() >= at_first_kill + 1000)
    run.kill_driver()
    at_second_kill = watched.num_tokens()
    assert watched.num_partial() > 0
    assert not list(tmp_path.glob("out/completions/*"))

    write_job(tmp_path, exaone, **{**blocks, "engine": {"kind": "fake"}})
    assert CommandRun(job_file).wait() == 0
    check_complete(tmp_path / "out", read_rows(tmp_path / "quiet"))
    assert watched.num_resumed_tokens() == at_second_kill
    assert watched.is_gone()


@pytest.mark.slow
def test_rows_of_a_real_model_go_on_in_their_middle_on_either_engine(
    tmp_path: Path, exaone: Path, ray_session: None
) -> None:
    """1. a padded engine is drained  2. a continuous one goes on, its process is killed  3. its successor ends it"""
    write_input(tmp_path / "in", [NUM_ROWS])

    def spec(kind: str, output: str, **limits: object) -> JobSpec:
        blocks: Mapping[str, Mapping[str, object]] = {
            "sampling": {
                "max_new_tokens": MAX_NEW_TOKENS,
                "ignore_eos": True,
                "temperature": 0.9,
                "logprobs": 2,
                "seed": 3,
            },
            "engine": {"kind": kind, **limits},
            "execution": EXECUTION,
        }
        return job(exaone, tmp_path / "in", tmp_path / output, **blocks)

    batchinfer.run(spec("padded", "quiet"))
    watched = Watched(tmp_path / "out")

    stop = threading.Event()
    waiter = threading.Thread(target=lambda: (wait_for(lambda: watched.num_tokens() >= 200), stop.set()))
    waiter.start()
    with pytest.raises(RunInterrupted, match="journaled"):
        batchinfer.run(spec("padded", "out", max_batch_rows=3), stop=stop)
    waiter.join()
    at_drain = watched.num_tokens()
    assert watched.num_partial() > 0

    results: list[batchinfer.JobResult] = []
    again = spec("continuous", "out", max_batch_rows=4)
    running = threading.Thread(target=lambda: results.append(batchinfer.run(again)))
    running.start()
    wait_for(lambda: watched.num_tokens() >= at_drain + 200)
    kill_replicas()
    at_kill = watched.num_tokens()
    running.join(PATIENCE_S)
    assert results[0].outcome == "complete"
    columns = ("id", "completion", "finish_reason", "num_completion_tokens")
    assert read_rows(tmp_path / "out", columns) == read_rows(tmp_path / "quiet", columns)
    assert watched.num_resumed_tokens() == at_kill < NUM_ROWS * MAX_NEW_TOKENS
    assert watched.is_gone()
