"""Names, job.json, plan.parquet, and the small repairs of an output directory."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import OutputError
from batchinfer.records import Plan, Shard, UnreadableShard, WorkUnit
from batchinfer.storage import layout
from batchinfer.storage.filesystem import locate
from batchinfer.storage.location import Location
from tests.outputs import NO_WAIT, memory_uri

SHARD = Shard("0123456789abcdef", "a/b.parquet", "s3://key:secret@bucket/a/b.parquet", 2500, 777, 1000)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri(), policy=NO_WAIT)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**12), st.integers(1, 10**9))
def test_part_names_and_unit_ids_are_one_to_one(shard: int, first_row: int, num_rows: int) -> None:
    unit = WorkUnit(f"{shard:016x}", first_row, num_rows)
    assert layout.parse_unit_id(unit.unit_id) == unit
    assert layout.unit_id_of(layout.part_name(unit.unit_id)) == unit.unit_id


@pytest.mark.parametrize(
    "name",
    [
        "part-0123456789abcdef-000000000-1024.parquet.tmp",
        "part-0123456789abcdef-0-1024.parquet",
        "part-0123456789abcdef-0000000000-1024.parquet",
        "part-0123456789ABCDEF-000000000-1024.parquet",
        "part-0123456789abcdef-000000000-0.parquet",
        "part-0123456789abcdef-000000000-01.parquet",
        "0123456789abcdef-000000000-1024.parquet",
        "part-x.parquet",
        "",
    ],
)
def test_a_name_not_spelled_exactly_so_is_no_part(name: str) -> None:
    assert layout.unit_id_of(name) is None


@pytest.mark.parametrize("unit_id", ["../../etc/passwd", "a/b", "", "0123456789abcdef-0-1"])
def test_no_part_is_named_after_anything_but_a_unit_id(output: Location, unit_id: str) -> None:
    with pytest.raises(OutputError, match="is no unit id"):
        layout.completions_part(output, unit_id)


def test_committed_units_are_the_parts_in_completions_and_nothing_else(output: Location) -> None:
    staging = layout.staging(output)
    assert layout.committed_units(output) == set()
    ids = {unit.unit_id for unit in SHARD.units}
    for unit_id in ids:
        layout.completions_part(output, unit_id).create_exclusive(b"", staging)
    layout.errors_part(output, WorkUnit("f" * 16, 0, 1).unit_id).write_replace(b"", staging)
    output.child("completions/_SUCCESS").write_replace(b"", staging)
    assert layout.committed_units(output) == ids


def test_twenty_thousand_parts_are_listed_in_a_second_or_two(tmp_path: Path) -> None:
    parts = tmp_path / "completions"
    parts.mkdir()
    for index in range(20_000):
        os.mknod(parts / f"part-{index:016x}-000000000-1024.parquet")
    started_s = time.monotonic()
    assert len(layout.committed_units(locate(str(tmp_path)))) == 20_000
    assert time.monotonic() - started_s < 5


def test_the_plan_reads_back_as_written_without_credentials(output: Location) -> None:
    plan = Plan(
        shards=(SHARD,),
        units=SHARD.units,
        unreadable=(UnreadableShard("bad.parquet", "s3://key:secret@bucket/bad.parquet", 3, "truncated"),),
        retired=(Shard("f" * 16, "old.parquet", "/in/old.parquet", 5, 99, 2),),
    )
    assert layout.read_plan(output) is None
    layout.write_plan(output, plan)
    read = layout.read_plan(output)
    assert read is not None
    assert b"secret" not in output.child("_job/plan.parquet").read_bytes()
    assert read.shards[0].uri == "s3://***@bucket/a/b.parquet"
    assert read.unreadable[0].uri == "s3://***@bucket/bad.parquet"
    assert (read.units, read.retired) == (plan.units, plan.retired)
    assert [unit.num_rows for unit in read.units] == [1000, 1000, 500]


def test_a_damaged_plan_names_the_file_and_the_way_out(output: Location) -> None:
    output.child("_job/plan.parquet").write_replace(b"PAR1 not really", layout.staging(output))
    with pytest.raises(OutputError, match=r"plan\.parquet: damaged .*remove it"):
        layout.read_plan(output)


def test_job_json_reads_back_with_its_format_version(output: Location) -> None:
    assert layout.read_job(output) is None
    layout.write_job(output, {"name": "작업", "fingerprint": "ab"})
    assert layout.read_job(output) == {"format_version": 1, "name": "작업", "fingerprint": "ab"}
    assert "작업" in output.child("_job/job.json").read_bytes().decode()


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "not readable as JSON"), (b"[]", "format_version is None"), (b'{"format_version": 2}', "reads 1")],
)
def test_a_job_json_of_another_kind_is_refused(output: Location, content: bytes, says: str) -> None:
    output.child("_job/job.json").write_replace(content, layout.staging(output))
    with pytest.raises(OutputError, match=says):
        layout.read_job(output)


def test_a_directory_with_other_peoples_files_is_refused_and_one_with_a_job_is_not(output: Location) -> None:
    staging = layout.staging(output)
    layout.check_usable(output)
    output.child("_job/lease.json").write_replace(b"{}", staging)
    output.child(".gitkeep").write_replace(b"", staging)
    layout.check_usable(output)
    output.child("thesis.docx").write_replace(b"years of work", staging)
    with pytest.raises(OutputError, match=r"holds thesis\.docx but no batchinfer job; choose an empty or a new"):
        layout.check_usable(output)
    layout.write_job(output, {})
    layout.check_usable(output)


def test_set_aside_moves_both_parts_of_a_unit_and_may_be_repeated_after_a_crash(output: Location) -> None:
    """Crash after the first move: the completions part is still there, so the second call finds the unit again."""
    unit_id, staging = SHARD.units[0].unit_id, layout.staging(output)
    layout.completions_part(output, unit_id).create_exclusive(b"c", staging)
    name = layout.part_name(unit_id)
    output.child(f"_job/superseded/errors/{name}").write_replace(b"e", staging)
    assert layout.committed_units(output) == {unit_id}
    for _ in range(2):
        layout.set_aside(output, [unit_id])
        assert layout.committed_units(output) == set()
        assert output.child(f"_job/superseded/completions/{name}").read_bytes() == b"c"
        assert output.child(f"_job/superseded/errors/{name}").read_bytes() == b"e"


def test_clear_staging_removes_what_a_crash_left_and_nothing_else(output: Location) -> None:
    staging = layout.staging(output)
    layout.write_job(output, {})
    staging.child("part.1234").write_replace(b"torn", output.child("_job"))
    layout.clear_staging(output)
    assert staging.files() == []
    assert layout.read_job(output) == {"format_version": 1}


def test_directories_of_a_run_that_wrote_nothing_are_removed(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"))
    lease = layout.lease_file(output)
    lease.create_exclusive(b"{}", layout.staging(output))
    lease.remove()
    layout.remove_if_unused(output)
    assert list(tmp_path.iterdir()) == []
    layout.write_job(output, {"a": 1})
    layout.remove_if_unused(output)
    assert json.loads((tmp_path / "out/_job/job.json").read_text())["a"] == 1
