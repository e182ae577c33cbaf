"""Input paths to plans, and what a resume makes of an earlier plan."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.errors import InputError, OutputError, StorageUnavailable
from batchinfer.planner import check_output_apart, columns_to_read, merge_plans, plan_input
from batchinfer.records import Plan, Shard, UnreadableShard, WorkUnit
from batchinfer.storage import footer as footer_module
from batchinfer.storage.filesystem import locate
from batchinfer.storage.local import LocalLocation
from batchinfer.storage.reader import ParquetReader
from tests.outputs import memory_uri, planned, write_shard


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """b.parquet, a/x.parquet, a/deep/y.parquet and files that are not part of the input."""
    root = tmp_path / "in"
    for name, num_rows in (("b.parquet", 25), ("a/x.parquet", 7), ("a/deep/y.parquet", 0)):
        write_shard(root / name, num_rows)
    for name in ("_SUCCESS", ".hidden.parquet", "_tmp/z.parquet", "a/.cache/z.parquet", "notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not a shard")
    return root


def paths_of(plan: Plan) -> list[str]:
    return [shard.path for shard in plan.shards]


def make_plan(*shards: Shard, retired: Sequence[Shard] = (), unreadable: Sequence[UnreadableShard] = ()) -> Plan:
    units = tuple(unit for shard in shards for unit in shard.units)
    return Plan(shards, units, tuple(unreadable), tuple(retired))


def shard(number: int, path: str, num_rows: int = 10, rows_per_unit: int = 4) -> Shard:
    return Shard(f"{number:016x}", path, f"/in/{path}", num_rows, 100, rows_per_unit)


# Listing


def test_a_directory_is_searched_at_every_depth_and_hidden_names_are_skipped(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "batchinfer.planner"):
        plan = planned(root)
    assert paths_of(plan) == ["a/deep/y.parquet", "a/x.parquet", "b.parquet"]
    assert [shard.num_rows for shard in plan.shards] == [0, 7, 25]
    assert "1 files that are not shards by their name are left out, such as notes.txt" in caplog.text


def test_a_file_is_a_shard_named_by_itself(root: Path) -> None:
    assert paths_of(planned(root / "a" / "x.parquet")) == ["x.parquet"]


def test_a_globs_names_are_relative_to_its_fixed_prefix(root: Path) -> None:
    assert paths_of(planned(f"{root}/a/*.parquet")) == ["x.parquet"]
    assert paths_of(planned(f"{root}/*/x.parquet")) == ["a/x.parquet"]
    assert paths_of(planned(f"{root}/**/*.parquet")) == ["a/deep/y.parquet", "a/x.parquet", "b.parquet"]


def test_a_list_keeps_its_order(root: Path) -> None:
    plan = plan_input([str(root / "b.parquet"), str(root / "a")], None, 10).plan
    assert paths_of(plan) == ["b.parquet", "deep/y.parquet", "x.parquet"]


@pytest.mark.parametrize("name", ["data[1]", "what?", "all*"])
def test_a_directory_whose_name_looks_like_a_glob_is_that_directory(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / name / "a.parquet", 3)
    write_shard(tmp_path / "data1" / "b.parquet", 3)
    write_shard(tmp_path / "whats" / "b.parquet", 3)
    found = plan_input([str(tmp_path / name)], None, 10)
    assert [shard.path for shard in found.plan.shards] == ["a.parquet"]
    with pytest.raises(OutputError, match="lies inside"):
        check_output_apart([str(tmp_path / name)], str(tmp_path / name / "out"))


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "part[1].parquet", 3)
    assert paths_of(planned(tmp_path / "in" / "part[1].parquet")) == ["part[1].parquet"]


def test_the_same_input_has_the_same_ids_wherever_it_moves_and_on_any_storage(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "moved")
    uri = memory_uri()
    for file in locate(str(root)).files():
        content = (root / file.name).read_bytes()
        locate(uri).child(f"in/{file.name}").write_replace(content, locate(uri).child("tmp"))
    units = planned(root).units
    assert planned(tmp_path / "moved").units == units
    assert plan_input([f"{uri}/in"], None, 10).plan.units == units
    assert plan_input([f"{uri}/in/**/*.parquet"], None, 10).plan.units == units


def test_shards_of_equal_content_stay_two_and_a_changed_shard_is_another(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", 5)
    shutil.copy(tmp_path / "in" / "a.parquet", tmp_path / "in" / "b.parquet")
    before = [shard.shard_id for shard in planned(tmp_path / "in").shards]
    assert len(set(before)) == 2
    write_shard(tmp_path / "in" / "b.parquet", 5, first=1)
    after = [shard.shard_id for shard in planned(tmp_path / "in").shards]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_units_cut_every_shard_without_gap_or_overlap(root: Path) -> None:
    plan = planned(root, rows_per_unit=10)
    by_id = {shard.shard_id: shard.path for shard in plan.shards}
    assert [(by_id[unit.shard_id], unit.first_row, unit.num_rows) for unit in plan.units] == [
        ("a/x.parquet", 0, 7),
        ("b.parquet", 0, 10),
        ("b.parquet", 10, 10),
        ("b.parquet", 20, 5),
    ]


@given(st.integers(0, 5000), st.integers(1, 700))
def test_each_row_is_in_exactly_one_unit(num_rows: int, rows_per_unit: int) -> None:
    units = shard(1, "a", num_rows, rows_per_unit).units
    rows = [row for unit in units for row in range(unit.first_row, unit.first_row + unit.num_rows)]
    assert rows == list(range(num_rows))
    assert all(0 < unit.num_rows <= rows_per_unit for unit in units)


# Footers


def test_only_footers_are_read_in_at_most_two_reads_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "in" / "a.parquet", 20_000, row_group_size=20)
    reads: list[int] = []
    read_range = LocalLocation.read_range

    def counted(self: LocalLocation, first_byte: int, num_bytes: int) -> bytes:
        reads.append(num_bytes)
        return read_range(self, first_byte, num_bytes)

    monkeypatch.setattr(LocalLocation, "read_range", counted)
    assert planned(path).num_rows == 20_000
    assert len(reads) == 2, "1000 row groups make a footer that the first read does not hold"
    assert reads[0] == footer_module._TAIL_BYTES
    assert sum(reads) < path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[:-7], "no Parquet footer at its end"),
        (lambda content: b"", "no Parquet footer at its end"),
        (lambda content: b"PAR1", "no Parquet footer at its end"),
        (lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1", "its footer claims"),
        (lambda content: content[:-60] + bytes(50) + content[-10:], "its footer cannot be decoded"),
        (lambda content: content[len(content) // 2 :], "shorter than its footer says"),
    ],
    ids=["cut", "empty", "magic only", "length", "thrift", "head missing"],
)
def test_an_unreadable_shard_is_named_and_the_others_go_on(
    root: Path, damage: object, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = write_shard(root / "a" / "bad.parquet", 3000).read_bytes()
    (root / "a" / "bad.parquet").write_bytes(damage(content))  # type: ignore[operator]
    plan = planned(root)
    assert paths_of(plan) == ["a/deep/y.parquet", "a/x.parquet", "b.parquet"]
    assert [(shard.path, shard.uri) for shard in plan.unreadable] == [
        ("a/bad.parquet", str(root / "a" / "bad.parquet"))
    ]
    assert says in plan.unreadable[0].error
    assert "bad.parquet" in caplog.text


def test_only_unreadable_shards_are_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(InputError, match=r"none of 2 shards can be read; the first, .*a\.parquet: no Parquet footer"):
        planned(tmp_path)


def test_a_shard_that_may_not_be_read_is_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_range = LocalLocation.read_range

    def forbidden(self: LocalLocation, first_byte: int, num_bytes: int) -> bytes:
        if self.path.endswith("b.parquet"):
            raise InputError(f"{self}: access refused")
        return read_range(self, first_byte, num_bytes)

    monkeypatch.setattr(LocalLocation, "read_range", forbidden)
    assert "access refused" in planned(root).unreadable[0].error


def test_storage_that_fails_ends_planning_rather_than_dropping_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LocalLocation, first_byte: int, num_bytes: int) -> bytes:
        raise StorageUnavailable("gone")

    monkeypatch.setattr(LocalLocation, "read_range", failing)
    with pytest.raises(StorageUnavailable):
        planned(root)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("nothing", "no such file or directory"),
        ("nothing/*.parquet", "the glob matches no file"),
        ("empty", "no shards in"),
    ],
)
def test_input_without_shards_is_an_input_error(tmp_path: Path, make: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=says):
        planned(tmp_path / make)


def test_a_path_named_twice_is_an_input_error(root: Path) -> None:
    with pytest.raises(InputError, match=r"names .*b\.parquet twice"):
        plan_input([str(root), str(root / "b.parquet")], None, 10)


def test_two_files_of_one_relative_path_are_an_input_error_naming_both(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_shard(tmp_path / name / "part-0.parquet", 3)
    with pytest.raises(InputError, match=r"train/part-0\.parquet and .*test/part-0\.parquet are both"):
        plan_input([str(tmp_path / "train"), str(tmp_path / "test")], None, 10)
    assert planned(f"{tmp_path}/*/part-0.parquet").num_rows == 6


# Columns


def schemas_of(tmp_path: Path, *tables: pa.Table) -> object:
    for index, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{index}.parquet")
    return plan_input([str(tmp_path)], None, 10).schemas


def columns(tmp_path: Path, tables: Sequence[pa.Table], needed: set[str], passed: Sequence[str] | None) -> object:
    return columns_to_read(schemas_of(tmp_path, *tables), needed, passed)  # type: ignore[arg-type]


def test_all_columns_pass_by_default_and_needed_ones_are_read_beside_listed_ones(tmp_path: Path) -> None:
    table = pa.table({"id": [1], "text": ["a"], "score": [0.5]})
    schemas = plan_input([str(_written(tmp_path, table))], None, 10).schemas
    assert columns_to_read(schemas, {"text"}, None) == (table.schema, ("id", "text", "score"))
    schema, passed = columns_to_read(schemas, {"text"}, ["score"])
    assert (schema.names, passed) == (["score", "text"], ("score",))


def _written(tmp_path: Path, table: pa.Table) -> Path:
    pq.write_table(table, tmp_path / "a.parquet")
    return tmp_path


def test_each_distinct_schema_comes_once_with_an_example(tmp_path: Path) -> None:
    for index in range(6):
        table = pa.table({"a": [1]}) if index % 2 else pa.table({"a": ["x"]})
        pq.write_table(table, tmp_path / f"{index}.parquet")
    schemas = plan_input([str(tmp_path)], None, 10).schemas
    assert [(each.example.path, str(each.schema.field("a").type)) for each in schemas] == [
        ("0.parquet", "string"),
        ("1.parquet", "int64"),
    ]


def test_a_job_that_needs_no_column_reads_one_so_that_its_rows_are_counted(tmp_path: Path) -> None:
    schemas = plan_input([str(_written(tmp_path, pa.table({"id": [1], "text": ["a"]})))], None, 10).schemas
    assert columns_to_read(schemas, set(), []) == (pa.schema([("id", pa.int64())]), ())


def test_a_missing_column_names_shard_column_and_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"shard 0\.parquet has no column 'mesages'; did you mean 'messages'\? It has: messages, id"
    ):
        columns(tmp_path, [pa.table({"messages": ["x"], "id": [1]})], {"mesages"}, ["id"])


def test_conflicting_types_name_both_shards(tmp_path: Path) -> None:
    tables = [pa.table({"id": [1]}), pa.table({"id": ["1"]})]
    with pytest.raises(InputError, match=r"column 'id' is int64 in shard 0\.parquet but string in shard 1\.parquet"):
        columns(tmp_path, tables, set(), None)


def test_null_columns_and_offset_widths_are_no_conflict(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    large = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    tables = [
        pa.table({"text": pa.nulls(1), "messages": pa.array([[]], pa.list_(message))}),
        pa.table({"text": pa.array(["a"], pa.large_string()), "messages": pa.array([[]], pa.large_list(large))}),
        pa.table({"text": ["a"], "messages": pa.array([[]], pa.list_(message))}),
    ]
    schema, _ = columns(tmp_path, tables, set(), None)  # type: ignore[misc]
    assert schema.field("text").type == pa.large_string()
    assert schema.field("messages").type == tables[0].schema.field("messages").type


def test_categorical_columns_are_what_they_hold(tmp_path: Path) -> None:
    categories = pa.array(["a", "b", "a"]).dictionary_encode()
    tables = [pa.table({"text": categories}), pa.table({"text": ["c"]})]
    schema, _ = columns(tmp_path, tables, {"text"}, None)  # type: ignore[misc]
    assert schema == pa.schema([("text", pa.string())])
    plan = planned(tmp_path)
    reader = ParquetReader(locate, schema)
    assert reader.read_unit(plan.shards[0], plan.units[0]).table.to_pydict() == {"text": ["a", "b", "a"]}


def test_a_column_of_some_shards_only_must_be_chosen_or_left_out(tmp_path: Path) -> None:
    tables = [pa.table({"id": [1]}), pa.table({"id": [1], "extra": [2]})]
    with pytest.raises(InputError, match=r"1\.parquet has columns that shard 0\.parquet lacks: extra.*output\.columns"):
        columns(tmp_path, tables, set(), None)
    assert columns(tmp_path, tables, {"id"}, ["id"]) == (pa.schema([("id", pa.int64())]), ("id",))


def test_input_columns_that_the_job_adds_itself_are_refused_when_all_pass(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"columns that the job adds itself: completion, row_id; rename them, or list"):
        columns(tmp_path, [pa.table({"row_id": [1], "completion": ["x"], "text": ["a"]})], {"text"}, None)


def test_an_empty_shard_has_no_say_in_types(tmp_path: Path) -> None:
    tables = [pa.table({"id": pa.nulls(0, pa.string())}), pa.table({"id": [1]})]
    assert columns(tmp_path, tables, set(), None) == (pa.schema([("id", pa.int64())]), ("id",))
    assert columns_to_read([], {"text"}, None) == (pa.schema([]), ())


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"])
    with pytest.raises(InputError, match="has 2 columns named 'id'"):
        columns(tmp_path, [table], set(), ["id"])


# Resume


def test_a_first_run_takes_the_plan_as_it_is() -> None:
    plan = make_plan(shard(1, "a"), shard(2, "b"))
    merged = merge_plans(None, plan, set())
    assert (merged.plan, merged.superseded, merged.superseded_units) == (plan, (), ())


def test_a_known_shard_keeps_the_cut_it_was_committed_with() -> None:
    before = make_plan(shard(1, "a", rows_per_unit=4))
    now = make_plan(shard(1, "a", rows_per_unit=5), shard(2, "b", rows_per_unit=5))
    merged = merge_plans(before, now, {before.units[0].unit_id})
    assert [shard.rows_per_unit for shard in merged.plan.shards] == [4, 5]
    assert merged.plan.units[:3] == before.units
    assert merged.superseded_units == ()


def test_a_changed_shard_supersedes_the_old_one_and_names_its_parts() -> None:
    before = make_plan(shard(1, "a"), shard(2, "b"))
    now = make_plan(shard(3, "a"), shard(2, "b"))
    committed = {before.units[0].unit_id, before.units[-1].unit_id}
    merged = merge_plans(before, now, committed)
    assert merged.superseded == (before.shards[0],)
    assert merged.superseded_units == (before.units[0].unit_id,)
    assert merged.plan == now


def test_a_vanished_shard_is_retired_and_what_is_committed_of_it_stays() -> None:
    before = make_plan(shard(1, "a"), shard(2, "b"))
    now = make_plan(shard(2, "b"), unreadable=[UnreadableShard("c", "/in/c", 1, "truncated")])
    merged = merge_plans(before, now, {unit.unit_id for unit in before.units})
    assert merged.plan.retired == (before.shards[0],)
    assert merged.superseded_units == ()
    assert merged.plan.unreadable == now.unreadable
    again = merge_plans(merged.plan, now, set())
    assert again.plan == merged.plan
    back = merge_plans(merged.plan, make_plan(shard(1, "a", rows_per_unit=9), shard(2, "b")), set())
    assert back.plan == before


def test_a_shard_that_became_unreadable_is_retired_not_superseded() -> None:
    before = make_plan(shard(1, "a"), shard(2, "b"))
    now = make_plan(shard(2, "b"), unreadable=[UnreadableShard("a", "/in/a", 1, "truncated")])
    merged = merge_plans(before, now, {before.units[0].unit_id})
    assert (merged.plan.retired, merged.superseded_units) == ((before.shards[0],), ())


def test_a_crash_between_setting_aside_and_the_new_plan_changes_nothing() -> None:
    """1. parts of the old shard are moved; 2. crash before plan.parquet; 3. the next run merges the same again."""
    before, now = make_plan(shard(1, "a")), make_plan(shard(2, "a"))
    first = merge_plans(before, now, {before.units[0].unit_id})
    second = merge_plans(before, now, set())
    assert second.plan == first.plan
    third = merge_plans(second.plan, now, {before.units[0].unit_id})
    assert third.superseded_units == (before.units[0].unit_id,)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of an input over time: its version and size change, its path does not."""

    path: str
    version: int
    num_rows: int


inputs = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=4)


@given(st.lists(st.tuples(inputs, st.integers(1, 9), st.randoms(use_true_random=False)), min_size=1, max_size=6))
def test_over_any_history_no_row_is_committed_twice_and_none_is_missing(history: list) -> None:  # type: ignore[type-arg]
    """Files come, change, go and return; rows_per_unit changes; each run commits some of its units."""
    previous: Plan | None = None
    committed: set[str] = set()
    by_id: dict[str, WorkUnit] = {}
    for files, rows_per_unit, chance in history:
        now = make_plan(
            *(
                shard(1000 * ord(path) + 100 * version + num_rows, path, num_rows, rows_per_unit)
                for path, (version, num_rows) in sorted(files.items())
            )
        )
        merged = merge_plans(previous, now, committed)
        committed -= set(merged.superseded_units)
        previous = merged.plan
        by_id |= {unit.unit_id: unit for unit in merged.plan.units}
        pending = [unit for unit in merged.plan.units if unit.unit_id not in committed]
        committed |= {unit.unit_id for unit in pending if chance.random() < 0.5}

        held = [by_id[unit_id] for unit_id in committed]
        rows = [(unit.shard_id, row) for unit in held for row in range(unit.first_row, unit.first_row + unit.num_rows)]
        assert len(rows) == len(set(rows)), "a row is committed twice"
        pending = [unit for unit in merged.plan.units if unit.unit_id not in committed]
        left = [
            (unit.shard_id, row) for unit in pending for row in range(unit.first_row, unit.first_row + unit.num_rows)
        ]
        wanted = {(shard.shard_id, row) for shard in now.shards for row in range(shard.num_rows)}
        assert wanted <= set(rows) | set(left), "a row is missing"
        assert not set(rows) & set(left), "a committed row would be generated again"
        kept = {shard.shard_id for shard in (*merged.plan.shards, *merged.plan.retired)}
        assert {unit.shard_id for unit in held} <= kept, "a part of a superseded shard is mixed in"


# Output apart from the input


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("s3://bucket/in", "s3://bucket/in/out"),
        ("s3://bucket/in", "s3a://bucket/in/"),
        ("s3://bucket/out/in", "s3://bucket/out"),
        ("s3://bucket/in/**/*.parquet", "s3://bucket/in/deep/out"),
        ("s3://bucket/in/*/*/*.parquet", "s3://bucket/in/out"),
        ("s3://bucket/in/*.parquet", "s3://bucket/in"),
        ("in", "in"),
        ("in", "./in/x/../out"),
        ("in/part-0.parquet", "in"),
        ("link", "in/out"),
    ],
)
def test_output_and_input_inside_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(OutputError, match=r"choose an(other)? output\.path"):
        check_output_apart(["elsewhere", source], output)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("s3://bucket/in", "s3://bucket/in2"),
        ("s3://bucket/in", "gs://bucket/in/out"),
        ("s3://bucket/data/*.parquet", "s3://bucket/data/out"),
        ("s3://bucket/data/in-*/*.parquet", "s3://bucket/data/out"),
        ("s3://bucket/data/part-0.parquet", "s3://bucket/data/out"),
        ("in", "out"),
    ],
)
def test_output_beside_the_input_is_fine(source: str, output: str) -> None:
    check_output_apart([source], output)


def test_the_refusal_shows_no_credentials() -> None:
    with pytest.raises(OutputError) as caught:
        check_output_apart(["s3://key:secret@bucket/in"], "s3://key:secret@bucket/in")
    assert "secret" not in str(caught.value)
