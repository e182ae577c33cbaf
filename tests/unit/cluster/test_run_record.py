"""What a run writes into ``_job/``: in which order, when at all, and never a credential."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster import run_record
from batchinfer.cluster.prepare import JobFacts, Preparation, prepare
from batchinfer.cluster.run_record import RunRecord
from batchinfer.fingerprint import fingerprint
from batchinfer.models.locate import Preflight
from batchinfer.planner import InputPlan
from batchinfer.records import Plan, Shard, UnitResult, UnreadableShard
from batchinfer.report import read_status
from batchinfer.spec import JobSpec
from batchinfer.storage.events import read_events
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import read_job, read_plan
from tests.jobs import fake_job, job, model_without_weights, write_input

RUN_ID = "20260101T000000-aaaaaa"
SECRET = "hunter2-do-not-print"


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return fake_job(model_without_weights(tmp_path / "model"), write_input(tmp_path / "in", [40]), tmp_path / "out")


def test_nothing_is_written_before_the_first_replica_is_ready(spec: JobSpec, tmp_path: Path) -> None:
    with RunRecord(prepare(spec), RUN_ID) as record:
        record.event("replica_starting", replica=0)
        record.event("replica_start_failed", replica=0, error="no such model")
    assert not (tmp_path / "out").exists()


def test_events_held_back_are_written_first_when_the_run_begins(spec: JobSpec, tmp_path: Path) -> None:
    preparation = prepare(spec)
    with RunRecord(preparation, RUN_ID) as record:
        record.event("replica_starting", replica=0)
        record.begin()
        record.begin()
        record.event("replica_ready", replica=0)
        dead = {"too_long": 1}
        record.unit_committed(0, UnitResult("unit", 16, 15, 1, 160, 90, 0.12345, dead_letters_by_type=dead))
    events = list(read_events(preparation.output))
    assert [event["event"] for event in events] == [
        "run_started",
        "replica_starting",
        "replica_ready",
        "unit_committed",
    ]
    assert events[0]["run"] == RUN_ID
    assert events[0]["num_units_pending"] == 3
    assert events[-1]["num_completion_tokens"] == 90
    assert events[-1]["elapsed_s"] == 0.123
    assert events[-1]["dead_letters_by_type"] == {"too_long": 1}
    assert (tmp_path / "out" / "_job" / "runs" / f"{RUN_ID}.jsonl").exists()


def test_held_back_events_keep_their_moment(spec: JobSpec) -> None:
    """Else loading a model for ten minutes would look like no time at all."""
    preparation = prepare(spec)
    with RunRecord(preparation, RUN_ID) as record:
        before = datetime.now(UTC)
        time.sleep(0.05)
        record.begin()
    [event] = read_events(preparation.output)
    assert datetime.fromisoformat(str(event["at"])) <= before


def test_the_plan_is_written_before_the_job_and_events_come_last(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """job.json makes a directory an output, so it must find its plan there already."""
    order: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(run_record, name)

        def call(*arguments: object) -> object:
            order.append(name)
            return real(*arguments)

        return call

    for name in ("clear_staging", "set_aside", "write_plan", "write_job", "open_event_log"):
        monkeypatch.setattr(run_record, name, noting(name))
    preparation = prepare(spec)
    with RunRecord(preparation, RUN_ID) as record:
        record.begin()
    assert order == ["clear_staging", "write_plan", "write_job", "open_event_log"]
    assert read_plan(preparation.output) == preparation.plan

    order.clear()
    with RunRecord(prepare(spec), "20260101T000001-bbbbbb") as record:
        record.begin()
    assert order == ["clear_staging", "open_event_log"]


def test_a_crash_before_the_job_is_written_leaves_no_output(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class SimulatedCrash(BaseException):
        pass

    def crash(*arguments: object) -> None:
        raise SimulatedCrash

    monkeypatch.setattr(run_record, "write_job", crash)
    preparation = prepare(spec)
    with pytest.raises(SimulatedCrash), RunRecord(preparation, RUN_ID) as record:
        record.begin()
    assert read_job(preparation.output) is None
    monkeypatch.undo()
    again = prepare(spec)
    assert again.is_new
    with RunRecord(again, "20260101T000001-bbbbbb") as record:
        record.begin()
    assert read_status(str(again.output)).state == "unfinished"


def test_parts_of_changed_shards_are_moved_before_the_plan_is_written(spec: JobSpec, tmp_path: Path) -> None:
    with RunRecord(prepare(spec), RUN_ID) as record:
        record.begin()
    unit_id = prepare(spec).pending[0].unit_id
    completions = tmp_path / "out" / "completions"
    completions.mkdir()
    pq.write_table(pa.table({"row_id": ["x"]}), completions / f"part-{unit_id}.parquet")
    pq.write_table(pa.table({"id": [1], "prompt": ["changed"]}), tmp_path / "in" / "part-0.parquet")
    with RunRecord(prepare(spec), "20260101T000001-bbbbbb") as record:
        record.begin()
    assert list(completions.iterdir()) == []
    superseded = tmp_path / "out" / "_job" / "superseded" / "completions"
    assert [path.name for path in superseded.iterdir()] == [f"part-{unit_id}.parquet"]
    plan = read_plan(locate(str(tmp_path / "out")))
    assert plan is not None
    assert plan.num_rows == 1


def test_job_json_says_what_the_job_is(spec: JobSpec) -> None:
    preparation = prepare(spec)
    with RunRecord(preparation, RUN_ID) as record:
        record.begin()
    written = read_job(preparation.output)
    assert written is not None
    assert written["fingerprint"] == preparation.fingerprint.digest
    assert written["fingerprint_parts"] == preparation.fingerprint.parts
    assert written["n"] == 1
    assert set(written["versions"]) >= {"batchinfer", "python", "ray", "torch", "transformers", "pyarrow"}
    assert set(written["reproducibility"]) == {"sampling", "float32"}
    assert written["spec"]["sampling"]["max_new_tokens"] == 12


def test_no_credential_reaches_a_file(tmp_path: Path) -> None:
    """In storage options, in the URIs of model and input, in what a shard's error quotes."""
    options = {"key": "user", "secret": SECRET, "client_kwargs": {"token": SECRET}}
    bucket = f"s3://user:{SECRET}@bucket"
    spec = job(
        f"{bucket}/model",
        f"{bucket}/prompts/*.parquet?sig={SECRET}",
        tmp_path / "out",
        model={"storage_options": options},
        input={"storage_options": options},
        output={"storage_options": options},
    )
    shard = Shard("0" * 16, "a.parquet", f"{bucket}/prompts/a.parquet", 10, 1000, 16)
    retired = Shard("1" * 16, "old.parquet", f"{bucket}/prompts/old.parquet", 10, 1000, 16)
    unreadable = UnreadableShard("b.parquet", f"{bucket}/prompts/b.parquet", 10, "truncated")
    plan = Plan((shard,), shard.units, (unreadable,), (retired,))
    identity = {"weights": "0123456789abcdef"}
    preparation = Preparation(
        facts=JobFacts(
            spec=spec,
            model=Preflight(tmp_path / "model", None, identity),
            fingerprint=fingerprint(spec, identity),
            max_model_len=512,
            input=InputPlan(plan, ()),
            schema=pa.schema([]),
            output_columns=(),
        ),
        output=locate(str(tmp_path / "out")),
        plan=plan,
        plan_changed=True,
        is_new=True,
        superseded=(),
        pending=plan.units,
        num_units_committed=0,
        num_rows_committed=0,
        num_dead_letters=0,
    )
    with RunRecord(preparation, RUN_ID) as record:
        record.begin()
        record.event("unit_failed", error=f"StorageUnavailable: {bucket}/prompts/a.parquet: 503")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [f"{RUN_ID}.jsonl", "job.json", "plan.parquet"]
    texts = {path.name: path.read_bytes().decode("latin-1") for path in files}
    texts["plan rows"] = json.dumps(pq.read_table(tmp_path / "out" / "_job" / "plan.parquet").to_pylist())
    assert "a.parquet" in texts["plan rows"]
    assert [name for name, text in texts.items() if SECRET in text] == []
