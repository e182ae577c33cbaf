"""Jobs of conversations, interrupted between and inside their turns."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.audit import verify_deep
from batchinfer.errors import RunInterrupted
from batchinfer.progress import ProgressView
from batchinfer.spec import JobSpec
from batchinfer.telemetry import RunProgress
from tests.e2e.test_journal import Watched, wait_for
from tests.jobs import job, read_rows

NUM_ROWS = 12
COLUMNS = ("id", "sample", "completion", "finish_reason", "num_prompt_tokens", "num_completion_tokens", "answers")


def write_turns(directory: Path) -> Path:
    """One shard; rows of one, two and three turns."""
    directory.mkdir()
    turns = [[f"{row} {turn}" for turn in range(1 + row % 3)] for row in range(NUM_ROWS)]
    table = pa.table({"id": range(NUM_ROWS), "turns": pa.array(turns, pa.list_(pa.string()))})
    pq.write_table(table, directory / "part-0.parquet")
    return directory


def conversing(model: Path, inputs: Path, output: Path, **blocks: Mapping[str, object]) -> JobSpec:
    spec: dict[str, Mapping[str, object]] = {
        "prompt": {"text": None, "turns": "turns"},
        "sampling": {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.9},
        "execution": {"rows_per_unit": 6, "journal_interval_s": 0.2},
    }
    return job(model, inputs, output, **{**spec, **blocks})


class Shown(ProgressView):
    """Remembers the most rows that were shown as done."""

    def __init__(self) -> None:
        self.most_rows = 0

    def show(self, progress: RunProgress) -> None:
        self.most_rows = max(self.most_rows, progress.num_rows_committed + progress.num_rows_finished)

    def close(self) -> None:
        pass


def stop_and_go_on(spec: JobSpec, going_on: JobSpec, output: Path, at_tokens: int) -> int:
    """Drain a run when so many tokens, some of later turns, are journaled, then run to the end; how many they were."""
    watched, stop = Watched(output), threading.Event()

    def is_time() -> bool:
        return watched.num_tokens() >= at_tokens and any(sequence.turn for sequence in watched.sequences())

    waiter = threading.Thread(target=lambda: (wait_for(is_time), stop.set()))
    waiter.start()
    with pytest.raises(RunInterrupted, match="journaled"):
        batchinfer.run(spec, stop=stop)
    waiter.join()
    num_tokens = watched.num_tokens()
    assert {sequence.turn for sequence in watched.sequences()} >= {0, 1}
    view = Shown()
    assert batchinfer.run(going_on, view).outcome == "complete"
    assert view.most_rows <= NUM_ROWS, "turns are no rows"
    assert watched.num_resumed_tokens() == num_tokens
    assert verify_deep(str(output)).findings == ()
    return num_tokens


@pytest.mark.usefixtures("ray_session")
def test_a_job_of_conversations_that_was_drained_goes_on_in_the_middle_of_their_turns(
    tmp_path: Path, exaone: Path
) -> None:
    inputs = write_turns(tmp_path / "in")
    batchinfer.run(conversing(exaone, inputs, tmp_path / "quiet", engine={"kind": "fake"}))
    slow = conversing(exaone, inputs, tmp_path / "out", engine={"kind": "fake", "fake": {"tokens_per_s": 500.0}})
    fast = conversing(exaone, inputs, tmp_path / "out", engine={"kind": "fake"})
    num_tokens = stop_and_go_on(slow, fast, tmp_path / "out", at_tokens=500)
    assert num_tokens < 24 * 60
    rows = read_rows(tmp_path / "out", COLUMNS)
    assert rows == read_rows(tmp_path / "quiet", COLUMNS)
    assert [len(answers) for *_, answers in rows] == [1, 2, 3] * 4  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_conversations_of_a_real_model_are_the_same_in_both_engines_and_across_a_drain(
    tmp_path: Path, exaone: Path
) -> None:
    """1. padded, undisturbed  2. continuous, drained in the middle  3. continuous again"""
    inputs = write_turns(tmp_path / "in")
    long: dict[str, Mapping[str, object]] = {
        "sampling": {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.9, "seed": 3, "n": 2}
    }
    batchinfer.run(conversing(exaone, inputs, tmp_path / "quiet", engine={"kind": "padded"}, **long))
    few = {"kind": "continuous", "max_batch_rows": 3}
    spec = conversing(exaone, inputs, tmp_path / "out", engine=few, **long)
    stop_and_go_on(spec, spec, tmp_path / "out", at_tokens=600)
    assert read_rows(tmp_path / "out", COLUMNS) == read_rows(tmp_path / "quiet", COLUMNS)
