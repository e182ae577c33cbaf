"""Numbered files: every committed completion once, in the input's order if asked, readable by others."""

import json
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from batchinfer.cli import main
from batchinfer.errors import OutputError
from batchinfer.export import export, numbered
from batchinfer.records import Plan
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part
from batchinfer.storage.location import Location
from tests.outputs import begin_job, finished_job, memory_uri, planned, publish, write_shard


def two_shards(tmp_path: Path) -> tuple[Location, Plan]:
    """Ids count through the input, so their order is the input's."""
    write_shard(tmp_path / "in" / "a.parquet", 25)
    write_shard(tmp_path / "in" / "b.parquet", 15, first=25)
    write_shard(tmp_path / "in" / "c.parquet", 12, first=40)
    plan = planned(tmp_path / "in")
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan, n=2)
    for unit in reversed(plan.units):
        publish(output, plan, unit, n=2)
    return output, plan


def ids(target: Path) -> list[int]:
    table = ds.dataset(target, format="parquet").to_table()
    return [int(value) for value in table.column("id").to_pylist()]


def test_ordered_restores_the_input_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "MAX_FILE_BYTES", 2000)
    output, _ = two_shards(tmp_path)
    result = export(str(output), str(tmp_path / "copy"), ordered=True)
    assert result.num_files > 2
    assert ids(tmp_path / "copy") == [number for number in range(52) for _ in range(2)]
    assert (result.num_completions, result.num_units_missing, result.exit_code) == (104, 0, 0)


def test_unordered_holds_the_same_rows(tmp_path: Path) -> None:
    output, _ = two_shards(tmp_path)
    export(str(output), str(tmp_path / "copy"))
    assert sorted(ids(tmp_path / "copy")) == [number for number in range(52) for _ in range(2)]


def test_json_lines_are_read_by_anybody(tmp_path: Path) -> None:
    output, _ = two_shards(tmp_path)
    export(str(output), str(tmp_path / "copy"), "jsonl", ordered=True)
    lines = [json.loads(line) for line in (tmp_path / "copy" / "part-00000.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(n, k) for n in range(52) for k in range(2)]
    assert lines[7]["completion"] == "answer 3.1"
    assert lines[7]["text"] == "row 3"


def test_what_is_missing_decides_the_exit_code(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[2])
    assert export(str(output), str(tmp_path / "copy")).exit_code == 1
    output.child(f"completions/part-{plan.units[1].unit_id}.parquet").remove()
    result = export(str(output), str(tmp_path / "another"))
    assert (result.exit_code, result.num_units_missing, result.num_completions) == (3, 1, 14)


def test_a_shorter_export_leaves_no_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = two_shards(tmp_path)
    monkeypatch.setattr(numbered, "MAX_FILE_BYTES", 2000)
    export(str(output), str(tmp_path / "copy"), ordered=True)
    (tmp_path / "copy" / "part-mine.parquet").write_bytes(b"not ours")
    monkeypatch.setattr(numbered, "MAX_FILE_BYTES", 1 << 30)
    assert export(str(output), str(tmp_path / "copy"), ordered=True, overwrite=True).num_files == 1
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["part-00000.parquet", "part-mine.parquet"]


def test_an_output_without_a_commit_exports_nothing(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    result = export(str(output), str(tmp_path / "copy"))
    assert (result.num_files, result.exit_code) == (0, 3)


def test_only_dead_letters_export_an_empty_file_with_columns(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path, num_rows=3, dead=[0, 1, 2])
    assert export(str(output), str(tmp_path / "copy")).num_files == 1
    assert "completion" in pq.read_schema(tmp_path / "copy" / "part-00000.parquet").names


def test_an_object_store_is_a_target(tmp_path: Path) -> None:
    output, _ = two_shards(tmp_path)
    target = memory_uri()
    export(str(output), target, ordered=True)
    assert locate(target).names() == {"part-00000.parquet"}


def test_the_output_itself_is_refused(tmp_path: Path) -> None:
    output, _ = two_shards(tmp_path)
    with pytest.raises(OutputError, match="beside it"):
        export(str(output), str(tmp_path / "out" / "completions"))
    with pytest.raises(OutputError, match="no batchinfer job"):
        export(str(tmp_path / "in"), str(tmp_path / "copy"))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    output, plan = two_shards(tmp_path)
    output.child(f"completions/part-{plan.units[1].unit_id}.parquet").write_replace(b"PAR1", output.child("_job/tmp"))
    with pytest.raises(OutputError, match=r"part-.*damaged"):
        export(str(output), str(tmp_path / "copy"))


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    output.child(f"completions/part-{plan.units[1].unit_id}.parquet").remove()
    result = CliRunner().invoke(main, ["export", str(output), str(tmp_path / "copy"), "--format", "jsonl", "--ordered"])
    assert result.exit_code == 3
    assert "15 completions in 1 files" in result.stdout
    assert "1 units are not committed yet" in result.stdout


def test_a_flipped_byte_is_not_copied(tmp_path: Path) -> None:
    """A page's own checksum tells; the file is whole Parquet otherwise."""
    output, plan = two_shards(tmp_path)
    place = completions_part(output, plan.units[1].unit_id)
    content = bytearray(place.read_bytes())
    content[60] ^= 1
    place.write_replace(bytes(content), output.child("_job/tmp"))
    with pytest.raises(OutputError, match=r"part-.*damaged"):
        export(str(output), str(tmp_path / "copy"))
