"""What the loop makes of the answers of replicas: events for the queue, a record, and the run's end."""

import threading
from pathlib import Path

import pytest

from batchinfer.cluster.messages import Assignment, Drained, Failure, ReplicaProgress
from batchinfer.cluster.prepare import Preparation, prepare
from batchinfer.cluster.replica_pool import ReplicaGone
from batchinfer.engine.engine import EngineStats
from batchinfer.errors import ClusterLost, ModelError, RunInterrupted
from batchinfer.storage.events import Event, read_events
from tests.jobs import fake_job, model_without_weights, write_input
from tests.scripted_replicas import committed, run_scripted

#: Ten units of four rows.
NUM_UNITS = 10


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    model = model_without_weights(tmp_path / "model")
    rows = write_input(tmp_path / "in", [4 * NUM_UNITS])
    execution = {"rows_per_unit": 4, "max_start_attempts": 3, "hang_timeout_s": 0.3}
    return prepare(fake_job(model, rows, tmp_path / "out", execution=execution))


@pytest.fixture(autouse=True)
def without_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.cluster.queue_policy.QueuePolicy.start_backoff_after", lambda policy, count: 0.0)


def events(preparation: Preparation, kind: str) -> list[Event]:
    return [event for event in read_events(preparation.output) if event["event"] == kind]


def test_every_unit_is_committed_and_counted_once(monkeypatch: pytest.MonkeyPatch, preparation: Preparation) -> None:
    result = run_scripted(monkeypatch, preparation, {}, num_replicas=3)
    assert (result.outcome, result.num_units_committed, result.num_rows_committed) == ("complete", 10, 40)
    assert len(events(preparation, "unit_committed")) == NUM_UNITS
    assert events(preparation, "run_finished")[0]["outcome"] == "done"


def test_replicas_that_cannot_start_say_why_once_and_the_run_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation, caplog: pytest.LogCaptureFixture
) -> None:
    failing = {"start": lambda replica_id, assignment: Failure("replica", "RuntimeError", "the GPU is busy")}
    with pytest.raises(ClusterLost, match=r"no replica could be started; .*said \(\d+ times\): .*the GPU is busy"):
        run_scripted(monkeypatch, preparation, failing, num_replicas=8)
    assert caplog.text.count("the GPU is busy") == 1
    assert not preparation.output.names()


def test_a_model_that_no_replica_can_load_is_the_jobs_fault(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    wrong = {"start": lambda replica_id, assignment: Failure("job", "ModelError", "no such tensor")}
    with pytest.raises(ModelError, match="no such tensor"):
        run_scripted(monkeypatch, preparation, wrong)
    assert not preparation.output.names()


@pytest.mark.parametrize("node_died", [False, True])
def test_a_replica_that_dies_is_replaced_and_its_units_move(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation, node_died: bool
) -> None:
    def generate(replica_id: int, assignment: Assignment | None) -> object:
        assert assignment is not None
        return ReplicaGone("its process ended", node_died) if replica_id == 0 else committed(assignment)

    result = run_scripted(monkeypatch, preparation, {"generate": generate})
    assert (result.outcome, result.num_replicas_died) == ("complete", 1)
    (died,) = events(preparation, "replica_died")
    assert (died["replica"], died["blameless"]) == (0, node_died)
    # Suspects are tried with nothing beside them; what a lost machine held goes on as if nothing had been.
    leases = [event["attempt"] for event in events(preparation, "unit_leased") if event["replica"] == 1]
    assert len(leases) >= NUM_UNITS


def test_a_replica_that_answers_nothing_is_ended_and_replaced(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    """Neither its units nor the question how it goes: what a stopped process or a stuck GPU looks like."""

    def generate(replica_id: int, assignment: Assignment | None) -> object:
        return None if replica_id == 0 or assignment is None else committed(assignment)

    def progress(replica_id: int, assignment: Assignment | None) -> object:
        return None if replica_id == 0 else ReplicaProgress(EngineStats())

    result = run_scripted(monkeypatch, preparation, {"generate": generate, "progress": progress})
    assert (result.outcome, result.num_replicas_died) == ("complete", 1)
    (stopped,) = (event for event in events(preparation, "replica_stopped") if event["error"])
    assert "no sign of life" in str(stopped["error"])


def test_a_replica_that_answers_but_does_nothing_is_ended_too(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    def generate(replica_id: int, assignment: Assignment | None) -> object:
        return None if replica_id == 0 or assignment is None else committed(assignment)

    result = run_scripted(monkeypatch, preparation, {"generate": generate})
    assert result.outcome == "complete"
    assert len([event for event in events(preparation, "replica_stopped") if event["error"]]) == 1


def test_a_drain_tells_what_is_committed_and_what_is_journaled(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    stop = threading.Event()

    def generate(replica_id: int, assignment: Assignment | None) -> object:
        assert assignment is not None
        if assignment.unit.first_row == 0:
            stop.set()
            return committed(assignment)
        return None

    scripts = {"generate": generate, "drain": lambda replica_id, assignment: Drained(7, 90)}
    with pytest.raises(RunInterrupted, match="4 of 40 rows are committed, 7 rows and 90 tokens of others are"):
        run_scripted(monkeypatch, preparation, scripts, stop=stop)
    (drained,) = events(preparation, "replica_drained")
    assert (drained["num_rows_journaled"], drained["num_tokens_journaled"]) == (7, 90)
    assert events(preparation, "run_finished")[0]["outcome"] == "drained"


def test_a_replica_whose_machine_was_given_notice_is_drained_and_its_units_move(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    begun = threading.Event()

    def generate(replica_id: int, assignment: Assignment | None) -> object:
        begun.set()
        return None if replica_id == 0 or assignment is None else committed(assignment)

    result = run_scripted(
        monkeypatch,
        preparation,
        {"generate": generate},
        num_replicas=2,
        going=lambda: frozenset({"node-0"} if begun.is_set() else ()),
    )
    assert (result.outcome, result.num_replicas_died) == ("complete", 0)
    assert [event["replica"] for event in events(preparation, "replica_drained")] == [0]


def test_the_last_counters_of_every_replica_are_recorded_before_its_end(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    asked = threading.Event()

    def progress(replica_id: int, assignment: Assignment | None) -> object:
        asked.set()
        return ReplicaProgress(EngineStats(num_steps=5), idle_s_by_cause={"rows": 0.5, "units": 1.0})

    def generate(replica_id: int, assignment: Assignment | None) -> object:
        assert assignment is not None
        if replica_id == 0:
            return ReplicaGone("its process ended", False) if asked.is_set() else None
        return committed(assignment)

    monkeypatch.setattr("batchinfer.cluster.replica_watch.PROGRESS_INTERVAL_S", 0.0)
    result = run_scripted(monkeypatch, preparation, {"progress": progress, "generate": generate}, num_replicas=2)
    assert result.outcome == "complete"
    ends = [
        (event["event"], event["replica"])
        for event in read_events(preparation.output)
        if event["event"] in ("replica_stats", "replica_stopped")
    ]
    assert ends[:2] == [("replica_stats", 0), ("replica_stopped", 0)]
    assert {replica for kind, replica in ends if kind == "replica_stats"} >= {0, 1}
    (stats, *_) = events(preparation, "replica_stats")
    assert (stats["num_steps"], stats["idle_s"], stats["batch_fill"]) == (5, 1.5, 0.0)
    assert (stats["idle_rows_s"], stats["idle_units_s"]) == (0.5, 1.0)
