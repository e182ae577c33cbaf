"""The promises of storage on a real S3 server: one winner per part, honest refusals, a job from plan to verify."""

import gzip
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer.audit import verify
from batchinfer.errors import InputError, LeaseHeld, LeaseLost, OutputError, PartExists, StorageUnavailable
from batchinfer.export import export
from batchinfer.planner import merge_plans, plan_input
from batchinfer.storage.events import open_event_log, read_events
from batchinfer.storage.filesystem import download_tree, locate
from batchinfer.storage.layout import (
    committed_units,
    completions_part,
    errors_part,
    read_plan,
    set_aside,
    staging,
)
from batchinfer.storage.lease import acquire
from batchinfer.storage.location import Location
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.shard_reader import ShardReader
from batchinfer.storage.writer import PublishOutcome, publish_unit
from tests.outputs import (
    NO_WAIT,
    PART,
    begin_job,
    completions_of,
    dead_letters_of,
    finished_job,
    num_dead_letters,
    rows_table,
    write_shard,
)
from tests.seaweed import BUCKET, S3Server, seaweed_or_skip

server = pytest.fixture(scope="module")(seaweed_or_skip)


@pytest.fixture
def root(server: S3Server) -> Location:
    """An empty prefix of the bucket."""
    return locate(f"s3://{BUCKET}/{uuid.uuid4().hex}", server.storage_options, policy=NO_WAIT)


def upload(root: Location, path: Path, name: str) -> None:
    root.child(name).write_replace(path.read_bytes(), staging(root))


def test_of_sixteen_writers_of_one_part_one_wins(root: Location) -> None:
    place = root.child("completions/part.parquet")
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        try:
            place.create_exclusive(bytes([number]) * 1000, staging(root))
        except PartExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert place.read_bytes() == bytes([won.index(True)]) * 1000


def test_files_are_written_listed_read_by_range_moved_and_removed(root: Location) -> None:
    assert root.names() == set()
    assert root.files() == []
    place = root.child("a/b/x.bin")
    assert place.read_if_present() is None
    place.write_replace(b"0123456789", staging(root))
    place.write_replace(b"abcdefghij", staging(root))
    assert place.read_bytes() == b"abcdefghij"
    assert place.read_range(8, 10) == b"ij"
    assert (root.names(), root.child("a").is_directory()) == ({"a"}, True)
    assert [(file.name, file.size_bytes) for file in root.files()] == [("a/b/x.bin", 10)]
    assert [file.name for file in root.glob("**/*.bin")] == ["a/b/x.bin"]
    place.move_to(root.child("c/x.bin"))
    assert [file.name for file in root.files()] == ["c/x.bin"]
    root.child("c/x.bin").remove()
    root.child("c/x.bin").remove()
    assert root.files() == []


def test_a_wrong_secret_is_refused_naming_the_way_out(server: S3Server) -> None:
    place = locate(f"s3://{BUCKET}/x", server.with_secret("wrong"), blames=InputError, policy=NO_WAIT)
    with pytest.raises(InputError, match=rf"s3://{BUCKET}/x: access refused .*storage_options") as caught:
        place.read_bytes()
    assert "wrong" not in str(caught.value)


def test_a_missing_bucket_is_named(server: S3Server) -> None:
    place = locate("s3://no-such-bucket-here/out/x", server.storage_options, policy=NO_WAIT)
    with pytest.raises(OutputError, match="s3://no-such-bucket-here/out/x: not found"):
        place.write_replace(b"x", place)


def test_an_endpoint_nobody_listens_at_is_storage_unavailable(server: S3Server) -> None:
    options = {**server.storage_options, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"connect_timeout": 1}}
    options["config_kwargs"]["retries"] = {"max_attempts": 0}
    place = locate(f"s3://{BUCKET}/x", options, policy=NO_WAIT)
    with pytest.raises(StorageUnavailable, match="still failing after 3 attempts"):
        place.read_range(0, 1)


def test_json_lines_in_a_bucket_are_read_by_ranges_and_streams(root: Location, server: S3Server) -> None:
    content = b"".join(b'{"id": %d, "text": "%s"}\n' % (number, b"x" * 200) for number in range(9000))
    for name, stored in (("in/a.jsonl", content), ("in/b.jsonl.gz", gzip.compress(content))):
        root.child(name).write_replace(stored, root)
    options = server.storage_options
    found = plan_input([f"{root.uri}/in"], options, 1000)
    reader = ShardReader(lambda uri: locate(uri, options, blames=InputError, policy=NO_WAIT), found.schemas[0].schema)
    shards = {shard.shard_id: shard for shard in found.plan.shards}
    for unit in found.plan.units:
        rows = reader.read_unit(shards[unit.shard_id].for_unit(unit), unit)
        assert rows.table["id"].to_pylist() == list(range(unit.first_row, unit.first_row + 1000))
    reader.close()


def test_a_job_from_plan_to_verify_with_resume_and_a_changed_shard(
    root: Location, server: S3Server, tmp_path: Path
) -> None:
    """1. plan; 2. publish, once with a race; 3. resume commits nothing anew; 4. a shard changes and is set aside."""
    upload(root, write_shard(tmp_path / "a.parquet", 25, row_group_size=8), "in/a.parquet")
    upload(root, write_shard(tmp_path / "b.parquet", 10), "in/sub/b.parquet")
    options = server.storage_options
    found = plan_input([f"{root.uri}/in"], options, 10)
    output = locate(f"{root.uri}/out", options, policy=NO_WAIT)
    begin_job(output, found.plan)
    reader = ParquetReader(lambda uri: locate(uri, options, blames=InputError, policy=NO_WAIT), found.schemas[0].schema)
    shards = {shard.shard_id: shard for shard in found.plan.shards}

    def publish(number: int) -> PublishOutcome:
        unit = found.plan.units[number]
        rows = reader.read_unit(shards[unit.shard_id], unit)
        assert rows.error is None
        assert rows.table.equals(rows_table(unit.num_rows, unit.first_row))
        completions = completions_of(unit, range(1, unit.num_rows))
        return publish_unit(output, unit, rows.table, completions, dead_letters_of(unit, [0]), PART)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(publish, [0, 0, 0, 0, 1, 1, 1, 1]))
    assert outcomes[:4].count(PublishOutcome.COMMITTED) == 1
    assert outcomes[4:].count(PublishOutcome.COMMITTED) == 1
    assert committed_units(output) == {unit.unit_id for unit in found.plan.units[:2]}
    assert verify(output.uri, options).verdict == "incomplete"
    for number in range(2, len(found.plan.units)):
        assert publish(number) is PublishOutcome.COMMITTED
    report = verify(output.uri, options)
    assert (report.verdict, report.num_rows_completed, report.num_dead_letters) == (
        "complete_with_dead_letters",
        31,
        4,
    )
    assert num_dead_letters(output) == 4
    before = read_plan(output)
    assert before is not None
    assert before.units == found.plan.units

    upload(root, write_shard(tmp_path / "b.parquet", 11), "in/sub/b.parquet")
    now = plan_input([f"{root.uri}/in"], options, 10).plan
    merged = merge_plans(before, now, committed_units(output))
    assert [shard.path for shard in merged.superseded] == ["sub/b.parquet"]
    assert len(merged.superseded_units) == 1
    set_aside(output, merged.superseded_units)
    old = merged.superseded_units[0]
    assert not completions_part(output, old).is_file()
    assert not errors_part(output, old).is_file()
    assert len(output.child("_job/superseded/completions").names()) == 1
    assert committed_units(output) == {unit.unit_id for unit in found.plan.units if unit.unit_id != old}


def test_the_lease_holds_is_taken_over_and_is_lost(root: Location) -> None:
    now = [datetime(2026, 1, 2, tzinfo=UTC)]
    start = threading.Barrier(8)

    def candidate(number: int) -> str | None:
        start.wait()
        try:
            return acquire(root, f"run-{number}", 60, lambda: now[0]).record.run_id
        except LeaseHeld:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [run_id for run_id in pool.map(candidate, range(8)) if run_id]
    assert len(winners) == 1
    first = acquire(root, winners[0], 60, lambda: now[0])
    record = root.child("_job/lease.json").read_bytes().replace(b'"host": "', b'"host": "elsewhere-')
    root.child("_job/lease.json").write_replace(record, staging(root))
    with pytest.raises(LeaseHeld, match="elsewhere-"):
        acquire(root, "next", 60, lambda: now[0])
    now[0] += timedelta(seconds=61)
    second = acquire(root, "next", 60, lambda: now[0])
    assert second.record.epoch == 2
    with pytest.raises(LeaseLost, match="taken over by run next"):
        first.heartbeat()
    second.heartbeat()
    second.release()
    assert root.child("_job").names() == set()


def test_events_become_segments(root: Location) -> None:
    log = open_event_log(root, "run")
    log.write("started")
    log.close()
    assert [event["event"] for event in read_events(root)] == ["started"]


def test_a_model_directory_is_fetched_without_pickles(root: Location, server: S3Server, tmp_path: Path) -> None:
    for name in ("config.json", "sub/model.safetensors", "pytorch_model.bin"):
        root.child(f"model/{name}").write_replace(name.encode(), staging(root))
    fetched = download_tree(f"{root.uri}/model", tmp_path / "cache", server.storage_options)
    assert fetched == ["config.json", "sub/model.safetensors"]
    assert (tmp_path / "cache/sub/model.safetensors").read_text() == "sub/model.safetensors"


def test_a_large_file_is_uploaded_in_parts_and_an_export_goes_there(
    root: Location, server: S3Server, tmp_path: Path
) -> None:
    """More than s3fs sends in one put; it appears as one object."""
    spool = tmp_path / "spool"
    spool.write_bytes(b"begin" + bytes(55 << 20) + b"end")
    place = root.child("exports/large")
    place.write_replace(b"old", staging(root))
    place.put_file(str(spool))
    assert place.size_bytes() == spool.stat().st_size
    assert place.read_range(0, 5) + place.read_range(place.size_bytes() - 3, 3) == b"beginend"

    output, _ = finished_job(tmp_path, dead=[2])
    target = root.child("exports/batch")
    result = export(str(output), target.uri, "openai-batch", target_options=server.storage_options)
    assert result.num_completions == 24
    assert target.names() == {"output.jsonl", "errors.jsonl"}
    assert target.child("errors.jsonl").read_bytes().count(b"\n") == 1
