"""The audit: a whole output passes, and each way to spoil one is caught and named."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import VerifyReport, verify
from batchinfer.errors import OutputError
from batchinfer.planner import merge_plans
from batchinfer.records import Plan, UnreadableShard, WorkUnit
from batchinfer.storage.checksums import add_to_parquet, read_label
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part, errors_part, staging, write_plan
from batchinfer.storage.location import Location
from tests.outputs import PART, begin_job, finished_job, memory_uri, planned, publish, rows_table, write_shard


def found(report: VerifyReport) -> list[tuple[str, str]]:
    return [(finding.kind, finding.where) for finding in report.findings]


def local_path(place: Location) -> Path:
    return Path(place.uri)


def rewrite(place: Location, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a part's rows and keep its metadata, as a careless tool might."""
    path = local_path(place)
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def part_of(unit: WorkUnit) -> str:
    return f"completions/part-{unit.unit_id}.parquet"


def test_a_whole_output_is_complete(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    report = verify(output.uri)
    assert report == VerifyReport(
        verdict="complete",
        output=output.uri,
        num_shards=1,
        num_units=3,
        num_units_committed=3,
        num_rows=25,
        num_rows_completed=25,
        num_completions=25,
        num_dead_letters=0,
    )
    assert report.exit_code == 0


def test_samples_and_dead_letters_are_counted(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path, n=3, dead=[1, 2])
    report = verify(output.uri)
    assert (report.verdict, report.exit_code, report.findings) == ("complete_with_dead_letters", 1, ())
    assert (report.num_rows_completed, report.num_completions, report.num_dead_letters) == (23, 69, 2)
    assert report.dead_letters_by_type == {"too_long": 2}
    assert json.loads(json.dumps(report.as_json()))["num_completions"] == 69


def test_an_output_on_an_object_store_is_audited_alike(tmp_path: Path) -> None:
    local, _ = finished_job(tmp_path, dead=[3])
    remote = locate(memory_uri())
    for file in local.files():
        remote.child(file.name).write_replace(local.child(file.name).read_bytes(), staging(remote))
    assert replace(verify(remote.uri), output="") == replace(verify(local.uri), output="")


def test_a_deleted_part_is_an_uncommitted_unit(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    completions_part(output, plan.units[1].unit_id).remove()
    report = verify(output.uri)
    assert found(report) == [("uncommitted_unit", plan.units[1].unit_id)]
    assert (report.verdict, report.exit_code, report.num_units_committed) == ("incomplete", 3, 2)


def test_a_duplicated_row_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    rewrite(completions_part(output, plan.units[1].unit_id), lambda table: pa.concat_tables([table, table.slice(4, 1)]))
    report = verify(output.uri)
    assert found(report) == [("duplicated_row", part_of(plan.units[1]))]
    assert plan.units[1].row_id(4) in report.findings[0].detail
    assert (report.verdict, report.exit_code) == ("damaged", 2)


def test_a_lost_row_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    rewrite(completions_part(output, plan.units[0].unit_id), lambda table: table.slice(1))
    report = verify(output.uri)
    assert found(report) == [("missing_row", part_of(plan.units[0]))]
    assert plan.units[0].row_id(0) in report.findings[0].detail


def test_a_lost_errors_part_loses_reasons_and_no_row(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[2, 3, 7])
    errors_part(output, plan.units[0].unit_id).remove()
    report = verify(output.uri)
    assert found(report) == [("missing_reason", part_of(plan.units[0]))]
    assert report.findings[0].detail.startswith("3 rows: ")
    shard_id = plan.units[0].shard_id
    assert report.findings[0].rows == (f"{shard_id}:2-3", f"{shard_id}:7")
    assert (report.verdict, report.num_dead_letters) == ("complete_with_dead_letters", 3)


def test_a_row_in_completions_and_errors_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[2])
    part = completions_part(output, plan.units[0].unit_id)

    def revive(table: pa.Table) -> pa.Table:
        ids = pa.array([plan.units[0].row_id(2)])
        return pa.concat_tables(
            [table, table.slice(0, 1).set_column(table.column_names.index("row_id"), "row_id", ids)]
        )

    rewrite(part, revive)
    assert found(verify(output.uri)) == [("row_in_both", part_of(plan.units[0]))]


def test_a_dead_letter_twice_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[2])
    place = errors_part(output, plan.units[0].unit_id)
    label = read_label(place, place.size_bytes())
    rewrite(place, lambda table: pa.concat_tables([table, table]))
    assert found(verify(output.uri)) == [("unfit_errors_part", f"errors/part-{plan.units[0].unit_id}.parquet")]
    # As only batchinfer itself could have written it.
    local_path(place).write_bytes(add_to_parquet(place.read_bytes(), label or b""))
    assert found(verify(output.uri)) == [("duplicated_row", f"errors/part-{plan.units[0].unit_id}.parquet")]


@pytest.mark.parametrize(
    "name", ["part-0000.parquet", "notes.txt", f"part-{'0' * 16}-000000000-10.parquet", "sub/x.parquet"]
)
@pytest.mark.parametrize("directory", ["completions", "errors"])
def test_a_foreign_part_is_caught(tmp_path: Path, directory: str, name: str) -> None:
    output, _ = finished_job(tmp_path)
    pq.write_table(rows_table(3), write_shard(tmp_path / "out" / directory / name, 3))
    report = verify(output.uri)
    assert found(report) == [("foreign_part", f"{directory}/{name}")]
    assert report.verdict == "damaged"


def test_a_part_with_a_wrong_fingerprint_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    unit = plan.units[2]
    completions_part(output, unit.unit_id).remove()
    publish(output, plan, unit, part=replace(PART, fingerprint="0" * 16))
    report = verify(output.uri)
    assert found(report) == [("wrong_fingerprint", part_of(unit))]
    assert f"{'0' * 16} in the part" in report.findings[0].detail


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -300])
def test_a_truncated_part_is_caught(tmp_path: Path, keep: int) -> None:
    output, plan = finished_job(tmp_path)
    path = local_path(completions_part(output, plan.units[0].unit_id))
    path.write_bytes(path.read_bytes()[:keep])
    report = verify(output.uri)
    assert found(report) == [("damaged_part", part_of(plan.units[0]))]
    assert (report.verdict, report.num_rows_completed) == ("damaged", 15)


def test_bytes_missing_from_the_middle_of_a_part_are_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    path = local_path(completions_part(output, plan.units[0].unit_id))
    content = path.read_bytes()
    path.write_bytes(content[:100] + content[150:])
    assert found(verify(output.uri)) == [("damaged_part", part_of(plan.units[0]))]


def test_overwritten_bytes_in_the_audited_columns_are_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    path = local_path(completions_part(output, plan.units[0].unit_id))
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert column.path_in_schema == "row_id"
    content = bytearray(path.read_bytes())
    content[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 0xFF
    path.write_bytes(content)
    assert found(verify(output.uri)) == [("damaged_part", part_of(plan.units[0]))]


def test_a_truncated_errors_part_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[2])
    path = local_path(errors_part(output, plan.units[0].unit_id))
    path.write_bytes(path.read_bytes()[:-10])
    report = verify(output.uri)
    assert found(report) == [("unfit_errors_part", f"errors/part-{plan.units[0].unit_id}.parquet")]
    assert (report.exit_code, report.num_dead_letters, report.dead_letters_by_type) == (3, 1, {"reason_lost": 1})


def test_a_part_under_another_units_name_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    source, target = (local_path(completions_part(output, unit.unit_id)) for unit in plan.units[:2])
    target.write_bytes(source.read_bytes())
    report = verify(output.uri)
    assert {kind for kind, _ in found(report)} == {"wrong_unit", "wrong_row_id", "missing_row"}
    assert {where for _, where in found(report)} == {part_of(plan.units[1])}


@pytest.mark.parametrize("row_id", ["x", "", None, "0:1", "{shard}:99", "{shard}:-1", "{shard}:1x"])
def test_wrong_row_ids_are_caught(tmp_path: Path, row_id: str | None) -> None:
    output, plan = finished_job(tmp_path)
    unit = plan.units[0]
    wrong = row_id.format(shard=unit.shard_id) if row_id is not None else None

    def replace_first(table: pa.Table) -> pa.Table:
        ids = [wrong, *table.column("row_id").to_pylist()[1:]]
        return table.set_column(table.column_names.index("row_id"), "row_id", pa.array(ids, pa.string()))

    rewrite(completions_part(output, unit.unit_id), replace_first)
    report = verify(output.uri)
    assert found(report) == [("wrong_row_id", part_of(unit)), ("missing_row", part_of(unit))]


def test_a_part_without_its_columns_is_caught(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    rewrite(completions_part(output, plan.units[0].unit_id), lambda table: table.drop_columns(["sample"]))
    assert found(verify(output.uri)) == [("damaged_part", part_of(plan.units[0]))]


@pytest.mark.parametrize("lost_sample", [0, 1, 2])
def test_a_lost_sample_is_caught(tmp_path: Path, lost_sample: int) -> None:
    output, plan = finished_job(tmp_path, n=3)
    rewrite(
        completions_part(output, plan.units[0].unit_id),
        lambda table: pa.concat_tables([table.slice(0, lost_sample), table.slice(lost_sample + 1)]),
    )
    report = verify(output.uri)
    assert found(report) == [("wrong_samples", part_of(plan.units[0]))]
    assert report.findings[0].detail == f"1 rows: {plan.units[0].row_id(0)}"


def test_rows_may_have_numbers_of_samples_of_their_own_when_the_job_says_so(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 20))
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan, n=1, sampling_column="how")
    publish(output, plan, plan.units[0], n=1)
    publish(output, plan, plan.units[1], n=4)
    assert verify(output.uri).verdict == "complete"
    rewrite(completions_part(output, plan.units[1].unit_id), lambda table: table.slice(1))
    assert found(verify(output.uri)) == [("wrong_samples", part_of(plan.units[1]))]


def test_what_a_crash_before_the_commit_leaves_is_only_an_uncommitted_unit(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[1])
    completions_part(output, plan.units[0].unit_id).remove()
    report = verify(output.uri)
    assert found(report) == [("uncommitted_unit", plan.units[0].unit_id)]
    assert report.num_dead_letters == 0


def test_the_wrong_errors_part_of_a_crashed_repair_is_caught(tmp_path: Path) -> None:
    """The loser of a commit died before it could fit its errors part to the winner's rows."""
    output, plan = finished_job(tmp_path, dead=[1, 2])
    other = locate(str(tmp_path / "other"))
    publish(other, plan, plan.units[0], dead=[2, 3])
    unit_id = plan.units[0].unit_id
    errors_part(output, unit_id).write_replace(errors_part(other, unit_id).read_bytes(), staging(output))
    report = verify(output.uri)
    assert found(report) == [("unfit_errors_part", f"errors/part-{unit_id}.parquet")]
    assert (report.verdict, report.exit_code) == ("incomplete", 3)
    assert report.dead_letters_by_type == {"too_long": 1, "reason_lost": 1}


def test_leftovers_of_a_changed_shard_are_named(tmp_path: Path) -> None:
    """1. all units committed; 2. the shard changes; 3. a new plan is written but nothing set aside."""
    output, before = finished_job(tmp_path, num_rows=10, dead=[0])
    now = planned(write_shard(tmp_path / "in" / "a.parquet", 12).parent)
    merged = merge_plans(before, now, {before.units[0].unit_id})
    write_plan(output, merged.plan)
    report = verify(output.uri)
    assert sorted(found(report)) == [
        ("superseded_part", part_of(before.units[0])),
        *(("uncommitted_unit", unit.unit_id) for unit in now.units),
    ]
    assert report.verdict == "damaged"


def test_committed_units_of_a_vanished_shard_stay_part_of_the_product(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "b.parquet", 4)
    output, before = finished_job(tmp_path, num_rows=10)
    completions_part(output, before.units[-1].unit_id).remove()
    (tmp_path / "in" / "b.parquet").unlink()
    now = planned(tmp_path / "in")
    write_plan(output, merge_plans(before, now, set()).plan)
    report = verify(output.uri)
    assert (report.verdict, report.num_rows, report.num_rows_completed) == ("complete", 10, 10)

    write_shard(tmp_path / "in" / "b.parquet", 4)
    (tmp_path / "in" / "a.parquet").unlink()
    write_plan(output, merge_plans(before, planned(tmp_path / "in"), set()).plan)
    report = verify(output.uri)
    assert (report.verdict, report.num_rows, report.num_rows_completed) == ("incomplete", 14, 10)


def test_an_unreadable_shard_is_named_and_counts_like_a_dead_letter(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    bad = UnreadableShard("bad.parquet", "/in/bad.parquet", 7, "no Parquet footer at its end")
    write_plan(output, replace(plan, unreadable=(bad,)))
    report = verify(output.uri)
    assert found(report) == [("unreadable_shard", "bad.parquet")]
    assert (report.verdict, report.exit_code) == ("complete_with_dead_letters", 1)


def test_a_plan_without_rows_is_complete(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"))
    begin_job(output, Plan((), ()))
    assert verify(output.uri).verdict == "complete"


def test_where_there_is_no_job_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no batchinfer job there"):
        verify(str(tmp_path / "nothing"))
    output, _ = finished_job(tmp_path)
    output.child("_job/plan.parquet").remove()
    with pytest.raises(OutputError, match="the job has no plan"):
        verify(output.uri)


def test_many_findings_of_one_kind_name_a_few_rows_and_their_number(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    rewrite(completions_part(output, plan.units[0].unit_id), lambda table: table.slice(0, 2))
    detail = verify(output.uri).findings[0].detail
    assert detail.startswith("8 rows: ")
    assert detail.count(plan.units[0].shard_id) == 5
    assert detail.endswith(", ...")


def test_planner_storage_and_verify_import_neither_torch_nor_ray_nor_transformers() -> None:
    script = (
        "import sys, batchinfer.planner, batchinfer.audit, batchinfer.storage.lease, batchinfer.storage.events\n"
        "print(sorted({'torch', 'ray', 'transformers', 's3fs'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
