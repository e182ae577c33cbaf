"""Which spans a run has and how they end: the driver's of replicas, a replica's of its units."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.messages import Assignment
from batchinfer.cluster.prepare import Preparation, prepare
from batchinfer.cluster.replica_pool import ReplicaGone
from batchinfer.cluster.replica_spans import ReplicaSpans
from batchinfer.cluster.unit_spans import NO_UNIT_SPANS, UnitSpans
from batchinfer.records import Shard, WorkUnit
from batchinfer.tracing.spans import Attribute, Span
from tests.jobs import fake_job, model_without_weights
from tests.scripted_replicas import committed, run_scripted


@dataclass
class Kept:
    """A span in a list."""

    name: str
    parent: str | None
    trace_parent: str | None
    attributes: dict[str, Attribute]
    ends: list[str] = field(default_factory=list)

    def end(self, error: str = "") -> None:
        self.ends.append(error)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(str(error or ""))


@dataclass
class KeptSpans:
    """Every span there was, in the order of their beginnings."""

    spans: list[Kept] = field(default_factory=list)
    num_flushes: int = 0

    def begin(self, name: str, parent: str | None, /, **attributes: Attribute) -> Span:
        self.spans.append(Kept(name, parent, f"{name}-{len(self.spans)}", attributes))
        return self.spans[-1]

    def flush(self) -> None:
        self.num_flushes += 1

    def close(self) -> None:
        pass


def assignment(first_row: int = 0, lease: int = 0, offsets: range = range(0)) -> Assignment:
    unit = WorkUnit("shard", first_row, 10)
    return Assignment(unit, Shard("shard", "a", "a", 100, 1), attempt=2, lease=lease, offsets=offsets)


def test_a_replicas_span_lasts_from_its_start_to_its_end() -> None:
    kept = KeptSpans()
    replicas = ReplicaSpans(kept, "job")
    setups = [replicas.begin(number) for number in range(3)]
    replicas.end(0, "")
    replicas.end(1, "its process ended")
    replicas.end(1, "")
    replicas.end(7, "")
    replicas.close()
    assert [setup.parent for setup in setups if setup is not None] == [span.trace_parent for span in kept.spans]
    assert [(span.name, span.parent, span.attributes) for span in kept.spans] == [
        ("replica", "job", {"replica": number}) for number in range(3)
    ]
    assert [span.ends for span in kept.spans] == [[""], ["its process ended"], ["the run broke off"]]


def test_stages_are_children_of_their_own_unit_and_units_of_their_replica() -> None:
    """1 two units in hand at once; 2 one of them fails and is tried again; 3 each try is flushed at its end."""
    kept = KeptSpans()
    units = UnitSpans(kept, "replica")
    first, second = assignment(0, lease=1), assignment(10, lease=2)
    with units.unit(first):
        with units.stage(second, "early"):
            pass
        with pytest.raises(ValueError, match="broken"), units.unit(second), units.stage(first, "read"):
            raise ValueError("broken")
        with units.unit(second), units.stage(second, "render"):
            pass
        assert kept.num_flushes == 2
    assert [(span.name, span.parent, span.ends) for span in kept.spans] == [
        ("unit", "replica", [""]),
        ("early", "replica", [""]),
        ("unit", "replica", ["broken"]),
        ("read", "unit-0", ["broken"]),
        ("unit", "replica", [""]),
        ("render", "unit-4", [""]),
    ]
    assert kept.spans[0].attributes == {"unit": first.unit.unit_id, "num_rows": 10, "attempt": 2, "is_probe": False}
    assert kept.num_flushes == 3


def test_a_probe_is_told_from_a_unit() -> None:
    kept = KeptSpans()
    with UnitSpans(kept, None).unit(assignment(offsets=range(3, 5))):
        pass
    assert (kept.spans[0].attributes["num_rows"], kept.spans[0].attributes["is_probe"]) == (2, True)


def test_without_traces_stages_cost_nothing_and_need_no_unit() -> None:
    with NO_UNIT_SPANS.stage(assignment(), "read"):
        pass


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["x"] * 40}), tmp_path / "in" / "rows.parquet")
    model = model_without_weights(tmp_path / "model")
    return prepare(fake_job(model, tmp_path / "in", tmp_path / "out", execution={"rows_per_unit": 4}))


def test_the_loop_ends_the_span_of_every_replica_that_it_began(
    monkeypatch: pytest.MonkeyPatch, preparation: Preparation
) -> None:
    died = threading.Event()

    def generate(replica_id: int, assignment: Assignment | None) -> object:
        assert assignment is not None
        if replica_id == 0 and not died.is_set():
            died.set()
            return ReplicaGone("its process ended", False)
        return committed(assignment)

    kept = KeptSpans()
    result = run_scripted(monkeypatch, preparation, {"generate": generate}, num_replicas=2, spans=kept)
    assert result.num_replicas_died == 1
    assert len(kept.spans) >= 2
    assert [len(span.ends) for span in kept.spans] == [1] * len(kept.spans)
    assert [span.ends[0] for span in kept.spans if span.ends != [""]] == ["its process ended"]
