"""The deep audit: every flipped bit, wrong value and stray file is named; what is no damage is only remarked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import VerifyReport, verify, verify_deep
from batchinfer.errors import OutputError
from batchinfer.records import Answer, TokenLogprobs
from batchinfer.storage import checksums
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part, errors_part, journal_directory, staging
from batchinfer.storage.location import Location
from batchinfer.storage.writer import publish_unit
from tests.outputs import (
    PART,
    begin_job,
    completions_of,
    finished_job,
    memory_uri,
    planned,
    publish,
    rows_table,
    write_shard,
)


def kinds(report: VerifyReport) -> list[str]:
    return [finding.kind for finding in report.findings]


def remarks(report: VerifyReport) -> list[tuple[str, str]]:
    return [(remark.kind, remark.where) for remark in report.remarks]


def local_path(place: Location) -> Path:
    return Path(place.uri)


def rewrite(place: Location, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a part's rows and give it the checksum it then should have, and its old label: only rows are wrong."""
    path = local_path(place)
    table = pq.read_table(path)
    label = checksums.read_label(place, place.size_bytes())
    assert label is not None
    sink = pa.BufferOutputStream()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), sink)
    path.write_bytes(checksums.add_to_parquet(sink.getvalue().to_pybytes(), label))


def with_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize("on", ["local", "memory"])
def test_a_whole_output_is_clean_and_all_of_it_was_read(tmp_path: Path, on: str) -> None:
    output, _ = finished_job(tmp_path, n=2, dead=[1, 2])
    if on == "memory":
        local, output = output, locate(memory_uri())
        for file in local.files():
            output.child(file.name).write_replace(local.child(file.name).read_bytes(), staging(output))
    deep = verify_deep(output.uri)
    parts = [file for file in output.files() if not file.name.startswith("_job")]
    assert deep.num_bytes_checked == sum(file.size_bytes for file in parts) > 0
    assert replace(deep, num_bytes_checked=0) == verify(output.uri)
    assert (deep.findings, deep.remarks, deep.exit_code) == ((), (), 1)


def test_a_flipped_bit_anywhere_in_a_part_is_found(tmp_path: Path) -> None:
    """Page headers, statistics and the footer too, which Parquet's own checksums leave out."""
    output, plan = finished_job(tmp_path, num_rows=10, dead=[4])
    for place in (completions_part(output, plan.units[0].unit_id), errors_part(output, plan.units[0].unit_id)):
        path = local_path(place)
        whole = path.read_bytes()
        unnoticed = []
        for position in range(0, len(whole), 41):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
            if verify_deep(output.uri).exit_code not in (2, 3):
                unnoticed.append(position)
        assert unnoticed == []
        path.write_bytes(whole)
    assert verify_deep(output.uri).findings == ()


@pytest.mark.parametrize("name", ["plan.parquet", "job.json"])
def test_a_flipped_bit_anywhere_in_plan_or_job_is_found(tmp_path: Path, name: str) -> None:
    output, _ = finished_job(tmp_path)
    path = tmp_path / "out" / "_job" / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        with pytest.raises(OutputError, match=name):
            verify_deep(output.uri)


def test_bytes_that_a_tool_wrote_anew_are_not_those_that_were_written(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    path = local_path(completions_part(output, plan.units[0].unit_id))
    pq.write_table(pq.read_table(path), path)
    assert verify(output.uri).verdict == "complete"
    report = verify_deep(output.uri)
    assert (kinds(report), report.verdict) == (["damaged_part"], "damaged")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("completion", pa.array(["a"] * 9 + [None], pa.string())),
        ("finish_reason", pa.array(["stop"] * 9 + ["eos"], pa.string())),
        ("finish_reason", pa.array(["stop"] * 9 + [None], pa.string())),
        ("num_prompt_tokens", pa.array([1] * 9 + [-1], pa.int32())),
        ("num_completion_tokens", pa.array([3] * 9 + [4], pa.int32())),
        ("token_ids", pa.array([[1, 2, 3]] * 9 + [[1]], pa.list_(pa.int32()))),
        ("logprobs", None),
    ],
)
def test_a_value_that_no_engine_writes_is_named_by_its_row(
    tmp_path: Path, column: str, values: "pa.Array | None"
) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 10).parent)
    output, unit = locate(str(tmp_path / "out")), plan.units[0]
    begin_job(output, plan)
    token = TokenLogprobs(1, -0.5)
    completions = [replace(it, logprobs=(token,) * 3) for it in completions_of(unit)]
    completions[3] = replace(completions[3], logprobs=None)
    publish_unit(output, unit, rows_table(10), completions, [], replace(PART, token_ids=True, logprobs=True))
    place = completions_part(output, unit.unit_id)
    assert verify_deep(output.uri).findings == ()
    if values is None:
        found = pq.read_table(local_path(place)).column("logprobs").to_pylist()
        values = pa.array([*found[:9], found[9][:1]], pq.read_table(local_path(place)).schema.field("logprobs").type)
    rewrite(place, with_column(column, values))
    report = verify_deep(output.uri)
    assert set(kinds(report)) == {"wrong_value"}
    assert all(finding.rows == (unit.row_id(9),) for finding in report.findings)
    # A wrong number of tokens shows where tokens are.
    named = {"num_completion_tokens": "token_ids"}.get(column, column)
    assert any(f"in column {named}" in finding.detail for finding in report.findings)


def test_answers_that_are_not_the_completion_s_are_named_by_their_row(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 6).parent)
    output, unit = locate(str(tmp_path / "out")), plan.units[0]
    begin_job(output, plan)
    completions = [
        replace(it, answers=(Answer("first", "stop", 3, 1), Answer(it.text, "stop", 5, 2)))
        for it in completions_of(unit)
    ]
    publish_unit(output, unit, rows_table(6), completions, [], replace(PART, answers=True))
    assert verify_deep(output.uri).findings == ()
    place = completions_part(output, unit.unit_id)
    answers = pq.read_table(local_path(place)).column("answers")
    found = answers.to_pylist()
    found[2][1]["completion"] = "another"
    found[3][0]["num_completion_tokens"] = 7
    found[4] = []
    found[5] = None
    rewrite(place, with_column("answers", pa.array(found, answers.type)))
    report = verify_deep(output.uri)
    assert {finding.rows for finding in report.findings} == {(f"{unit.row_id(2)}-5",)}
    assert all("in column answers" in finding.detail for finding in report.findings)


def test_a_passed_column_that_cannot_be_decoded_is_damage(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    path = local_path(completions_part(output, plan.units[0].unit_id))
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    assert column.path_in_schema == "text"
    content = bytearray(path.read_bytes())
    content[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 0xFF
    path.write_bytes(content)
    assert verify(output.uri).verdict == "complete"
    assert kinds(verify_deep(output.uri)) == ["damaged_part"]


def test_rows_have_the_samples_that_their_own_column_asks_for(tmp_path: Path) -> None:
    """Rows ask for 2, nothing (the job's 1) and 3 samples; a tool cuts the last sample of the third row."""
    how = pa.array([{"n": 2}, {"n": None}, {"n": 3}], pa.struct([("n", pa.int32())]))
    (tmp_path / "in").mkdir()
    table = pa.table({"id": [0, 1, 2], "how": how})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    plan = planned(tmp_path / "in")
    output, unit = locate(str(tmp_path / "out")), plan.units[0]
    begin_job(output, plan, n=1, sampling_column="how")
    completions = [completion for row, n in enumerate([2, 1, 3]) for completion in completions_of(unit, [row], n)]
    publish_unit(output, unit, table, completions, [], replace(PART, columns=("id", "how")))
    assert verify_deep(output.uri).findings == ()
    rewrite(completions_part(output, unit.unit_id), lambda table: table.slice(0, 5))
    assert verify(output.uri).findings == ()
    report = verify_deep(output.uri)
    assert (kinds(report), report.findings[0].rows) == (["wrong_samples"], (unit.row_id(2),))


def test_an_input_that_changed_or_went_is_remarked_and_changes_no_verdict(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "b.parquet", 4)
    write_shard(tmp_path / "in" / "c.parquet", 4)
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    for unit in plan.units:
        publish(output, plan, unit)
    write_shard(tmp_path / "in" / "b.parquet", 5)
    (tmp_path / "in" / "c.parquet").unlink()
    report = verify_deep(output.uri)
    assert (report.verdict, report.findings) == ("complete", ())
    assert remarks(report) == [("input_changed", "b.parquet"), ("input_out_of_reach", "c.parquet")]
    assert "has 5 rows" in report.remarks[0].detail
    json.dumps(report.as_json())


def test_a_shard_with_other_bytes_and_the_same_rows_is_another_shard(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    write_shard(tmp_path / "in" / "a.parquet", 25, first=1)
    assert remarks(verify_deep(output.uri)) == [("input_changed", "a.parquet")]


def test_what_crashes_left_is_remarked(tmp_path: Path) -> None:
    """Journals of a committed unit, of a foreign one and of a unit at work; staged bytes; errors without a commit."""
    output, plan = finished_job(tmp_path, dead=[1])
    completions_part(output, plan.units[0].unit_id).remove()
    foreign = f"{'0' * 16}-000000000-10"
    for unit_id in (plan.units[0].unit_id, plan.units[1].unit_id, foreign):
        segment = journal_directory(output, unit_id).child("run-00000001-000001.arrow")
        segment.write_replace(b"torn", staging(output))
    staging(output).child("half").write_replace(b"12345", staging(output))
    report = verify_deep(output.uri)
    assert (kinds(report), report.verdict) == (["uncommitted_unit"], "incomplete")
    assert sorted(remarks(report)) == sorted(
        [
            ("leftover_errors_part", f"errors/part-{plan.units[0].unit_id}.parquet"),
            ("leftover_bytes", "_job/tmp"),
            ("damaged_segment", f"_job/journal/{plan.units[0].unit_id}"),
            ("leftover_journal", f"_job/journal/{plan.units[1].unit_id}"),
            ("leftover_journal", f"_job/journal/{foreign}"),
        ]
    )


def test_deep_audits_name_lost_rows_as_the_quick_one_does(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, n=2)
    rewrite(completions_part(output, plan.units[1].unit_id), lambda table: table.slice(0, 4))
    report = verify_deep(output.uri)
    assert kinds(report) == ["missing_row"]
    assert report.findings[0].rows == (f"{plan.units[1].row_id(2)}-{plan.units[1].first_row + 9}",)
    assert report.findings == verify(output.uri).findings
