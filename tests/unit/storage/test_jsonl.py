"""JSON Lines: what a line is, which type its values get, and that units give exactly their rows, whatever the cut."""

import gzip
import json
import math
import os
import re
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, RowRejected, ShardCorrupt, StorageUnavailable
from batchinfer.planner import InputPlan, columns_to_read, plan_input
from batchinfer.records import LineBlocks, Shard, WorkUnit
from batchinfer.storage import jsonl_scan, jsonl_stream, jsonl_values
from batchinfer.storage.filesystem import locate
from batchinfer.storage.jsonl_reader import JsonlReader
from batchinfer.storage.jsonl_stream import FileBytes, LineBytes, blocks
from batchinfer.storage.jsonl_types import Survey
from batchinfer.storage.jsonl_values import may_be_sound, parse_in_bulk, parse_line, parse_lines, rows_of
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.shard_reader import ShardReader
from tests.outputs import NO_WAIT, memory_uri

open_input = partial(locate, blames=InputError, policy=NO_WAIT)
Rows = Sequence[dict[str, Any]]


def write_lines(path: Path, rows: Rows, *, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return path


def planned(path: Path | str, rows_per_unit: int = 10, **options: Any) -> InputPlan:
    return plan_input([str(path)], None, rows_per_unit, NO_WAIT, **options)


def schema_of(found: InputPlan) -> pa.Schema:
    return columns_to_read(found.schemas, (), None)[0]


def read(found: InputPlan, schema: pa.Schema | None = None) -> pa.Table:
    """All rows of all units, in order, each read with only the lines that travel with it."""
    reader = ShardReader(open_input, schema or schema_of(found))
    shards = {shard.shard_id: shard for shard in found.plan.shards}
    tables = []
    for unit in found.plan.units:
        rows = reader.read_unit(shards[unit.shard_id].for_unit(unit), unit)
        assert (rows.error, rows.num_missing, dict(rows.rejected)) == (None, 0, {})
        assert rows.table.num_rows == unit.num_rows
        tables.append(rows.table)
    reader.close()
    return pa.concat_tables(tables)


def rejections(found: InputPlan) -> dict[int, str]:
    """Of an input of one shard, by row."""
    reader, shard = JsonlReader(open_input, schema_of(found)), found.plan.shards[0]
    return {
        unit.first_row + offset: str(reason)
        for unit in found.plan.units
        for offset, reason in reader.read_unit(shard, unit).rejected.items()
    }


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few lines, fetched by a few bytes, so that small files have many."""
    monkeypatch.setattr(jsonl_stream, "_FIRST_BLOCK_BYTES", 40)
    monkeypatch.setattr(jsonl_stream, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(jsonl_stream, "_FETCH_BYTES", 64)


# What a line is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1', "Expecting ',' delimiter at character 8"),
        (b'{"a": 1} {"a": 2}', "Extra data at character 10"),
        (b"[1]", r"is \[1\], not an object"),
        (b'"text"', "is 'text', not an object"),
        (b"null", "is null, not an object"),
        (b'{"a": NaN}', "NaN is no JSON; write null"),
        (b'{"a": [-Infinity]}', "-Infinity is no JSON"),
        (b'{"a": 1e400}', "the number 1e400 is beyond a float64"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'{"x": {"\\u0061": 1, "a": 3}}', "the key 'a' is there twice"),
        (b'{"a": "\xff"}', "byte 8 is no UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "byte 8 is no UTF-8"),
        (b'{"a": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"a": {"\\uDE00": 1}}', "half of a surrogate pair"),
        (b'{"a": "tab\there"}', "Invalid control character"),
        (b'{"a": 1}\0', "Extra data"),
        (b'\x0c{"a": 1}', "Expecting value"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 100 levels"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 100 levels"),
        (b'{"a":' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_json_object_says_why(line: bytes, says: str) -> None:
    with pytest.raises(RowRejected, match=says) as caught:
        parse_line(line)
    assert caught.value.error_type == "bad_json"


def test_what_json_allows_is_taken_as_it_is() -> None:
    line = '{"a": "\\u0000\\ud83d\\ude00 한글", "": -0, "b": [1e5, 0.1, -9223372036854775809], "c": {}, "d": null}'
    assert parse_line(line.encode()) == {
        "a": "\0😀 한글",
        "": 0,
        "b": [1e5, 0.1, -9223372036854775809],
        "c": {},
        "d": None,
    }
    assert parse_line(b'{"a":' + b"[" * 99 + b"]" * 99 + b"}") is not None


def test_blank_lines_are_no_rows_and_keep_their_numbers() -> None:
    assert rows_of(b'{"a":1}\r\n \t\r\n\n  {"a":2} ') == [(0, b'{"a":1}'), (3, b'{"a":2}')]
    assert rows_of(b"\n\n") == []


# Arrow's parser against Python's -----------------------------------------------------------------------

names = st.sampled_from(["a", "b", "한", ""])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
rows = st.dictionaries(names, values, max_size=3)
fragments = st.sampled_from(
    [
        b"NaN",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"a":1,',
        b"\n",
        b" ",
        b"\xff",
        b"\\ud800",
        b"1e999",
        b"\0",
        b",",
        b"{}",
        b'"',
        b"0",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(rows, min_size=1, max_size=4),
    st.lists(st.tuples(fragments, st.integers(0, 60)), max_size=3),
    st.booleans(),
)
@example([{}, {"a": 1}], [], False)
@example([{"a": [None, 1]}, {"a": [None, "x"]}], [], False)
def test_lines_that_arrow_takes_are_lines_that_python_takes_and_mean_the_same(
    objects: Rows, damage: list[tuple[bytes, int]], ascii_only: bool
) -> None:
    """The types are those of the undamaged lines: damage that Arrow overlooks would pass for a value."""
    content = "\n".join(json.dumps(each, ensure_ascii=ascii_only) for each in objects).encode()
    survey = Survey()
    for each in objects:
        survey.observe(each)
    types = {name: field.arrow_type() for name, field in survey.fields.items()}
    schema = pa.schema([(name, type_) for name, type_ in types.items() if type_ is not None])
    for piece, at in damage:
        content = content[:at] + piece + content[at:]
    lines = [row for _, row in rows_of(content)]
    if not may_be_sound(lines) or len(schema) < len(types):
        return
    table = parse_in_bulk(lines, schema, "error")
    if table is None:
        assert damage, "Arrow refuses lines that are as their types say"
        return
    seen = Survey()
    if not jsonl_scan._observe_table(seen, table):
        return
    parsed = [parse_line(line) for line in lines]
    assert table.equals(pa.Table.from_pylist(parsed, schema=schema))


DOUBLE, TEXT = pa.schema([("a", pa.float64())]), pa.schema([("a", pa.string())])


@pytest.mark.parametrize(
    ("block", "schema", "num_rejected"),
    [
        (b'{"a": NaN}\n{"a": 1.5}\n{"a": -Infinity}', DOUBLE, 2),
        (b'{"a": 1} {"a": 2}\n{"a":\n3}\n', DOUBLE, 3),
        (b'{"a": 9007199254740993}\n{"a": 0.5}', DOUBLE, 0),
        (b'{"a": "\xff"}\n{"a": "b"}', TEXT, 1),
        (b'{"a": "b", "a": "c"}\n{"a": "\\ud800"}', TEXT, 2),
        (b'{"a": "b"}\0\n{"a": "c"}\n', TEXT, 1),
        (b'{"a": "b", "deep": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", TEXT, 1),
    ],
    ids=["NaN", "lines joined", "wide integer", "UTF-8", "twice", "NUL", "deep"],
)
def test_what_arrow_would_overlook_is_seen(block: bytes, schema: pa.Schema, num_rejected: int) -> None:
    """With types known, blocks are first shown to Arrow; the outcome is that of looking at each line."""
    in_bulk = jsonl_scan._scan_block(block, schema, ())
    by_line = jsonl_scan._scan_block(block, None, ())
    assert in_bulk.num_rejected == by_line.num_rejected == num_rejected
    assert (in_bulk.num_rows, in_bulk.num_lines) == (by_line.num_rows, by_line.num_lines)
    assert in_bulk.rows.arrow_type() == by_line.rows.arrow_type()


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=12).filter(any), st.integers(1, 5), st.booleans())
def test_random_rows_have_the_values_that_a_parquet_input_of_them_has(
    tmp_path_factory: pytest.TempPathFactory, objects: Rows, rows_per_unit: int, compressed: bool
) -> None:
    """Columns of one type come out equal through both formats; columns of none come out as JSON texts of the values."""
    root = tmp_path_factory.mktemp("in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_stream, "_FIRST_BLOCK_BYTES", 20)
        patch.setattr(jsonl_stream, "_BLOCK_BYTES", 60)
        content = "\n".join(json.dumps(each) for each in objects).encode()
        path = root / ("a.jsonl.gz" if compressed else "a.jsonl")
        path.write_bytes(gzip.compress(content) if compressed else content)
        found = planned(path, rows_per_unit)
        table = read(found)
    assert table.num_rows == len(objects)
    assert set(table.column_names) == {name for each in objects for name in each}
    texts = jsonl_values.json_text_columns(schema_of(found))
    for name in texts:
        got = [None if text is None else json.loads(text) for text in table[name].to_pylist()]
        assert got == [each.get(name) for each in objects]
    typed = table.drop_columns(list(texts))
    if typed.num_columns:
        pq.write_table(pa.Table.from_pylist(list(objects), schema=typed.schema), root / "b.parquet")
        through_parquet = planned(root / "b.parquet", rows_per_unit)
        assert read(through_parquet, typed.schema).equals(typed)
        for name in typed.column_names:
            for value, each in zip(typed[name].to_pylist(), objects, strict=True):
                assert _holds(value, each.get(name)), (value, each.get(name))


def _holds(got: object, meant: object) -> bool:
    """Whether a typed value says what the JSON value does: null for what is absent, integers perhaps as floats."""
    if isinstance(got, dict):
        return isinstance(meant, dict) and all(_holds(value, meant.get(name)) for name, value in got.items())
    if isinstance(got, list):
        return isinstance(meant, list) and len(got) == len(meant) and all(map(_holds, got, meant))
    return got == meant and isinstance(got, bool) == isinstance(meant, bool)


# Types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "type_"),
    [
        ([1, 2.5, None], pa.float64()),
        ([2**60, 1], pa.int64()),
        ([2**60, 0.5], None),
        ([2**64], None),
        ([1, "1"], None),
        ([1, True], None),
        ([None], pa.string()),
        ([[], [None]], pa.list_(pa.string())),
        ([[1], [2.0]], pa.list_(pa.float64())),
        ([[1], "x"], None),
        ([{"a": 1}, {"b": {"c": None}}], pa.struct([("a", pa.int64()), ("b", pa.struct([("c", pa.string())]))])),
        ([{"a": 1}, {"a": "x"}], None),
        ([{}], None),
        ([{f"k{n}": n} for n in range(1001)], None),
    ],
)
def test_one_type_for_all_values_or_none(seen: list[object], type_: pa.DataType | None) -> None:
    survey, merged = Survey(), Survey()
    for value in seen:
        survey.observe(value)
        one = Survey()
        one.observe(value)
        merged.merge(one)
    assert survey.arrow_type() == merged.arrow_type() == type_


def test_deep_values_become_texts_where_no_file_format_holds_their_type(tmp_path: Path) -> None:
    value: object = 1
    for _ in range(40):
        value = {"a": [value]}
    found = planned(write_lines(tmp_path / "a.jsonl", [{"deep": value}]))
    assert json.loads(read(found)["deep"][0].as_py()) == value


@pytest.mark.parametrize(
    ("seen", "expected", "type_"),
    [
        ([1, "x"], pa.string(), pa.string()),
        ([1], pa.string(), pa.int64()),
        ([["x"], "x"], pa.list_(pa.string()), pa.list_(pa.string())),
        ([["x", 1]], pa.list_(pa.string()), pa.list_(pa.string())),
        ([None], pa.list_(pa.int64()), pa.list_(pa.int64())),
        ([None], pa.struct([]), pa.null()),
        ([[{"content": "x", "n": 1}, {"content": []}]], pa.list_(pa.struct([("content", pa.string())])), "struct"),
    ],
)
def test_an_expected_type_is_taken_where_any_value_has_it(
    seen: list[object], expected: pa.DataType, type_: object
) -> None:
    survey = Survey()
    for value in seen:
        survey.observe(value)
    if type_ == "struct":
        type_ = pa.list_(pa.struct([("content", pa.string()), ("n", pa.int64())]))
    assert survey.arrow_type(expected) == type_


def test_a_mixture_is_named_with_its_place() -> None:
    survey = Survey()
    survey.observe([{"score": 1}, {"score": "high"}])
    assert survey.mixture() == "in lists under 'score' integers and strings"


# Shards ----------------------------------------------------------------------------------------------------


def test_byte_order_mark_line_ends_blank_lines_and_a_last_line_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id":1}\r\n\r\n   \n{"id":2}\r\n{"id":3}')
    found = planned(tmp_path)
    assert found.plan.num_rows == 3
    assert read(found).to_pydict() == {"id": [1, 2, 3]}
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert planned(tmp_path).plan.num_rows == 0
    assert planned(tmp_path).schemas == ()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_unit_gives_its_rows_in_any_order(tmp_path: Path, compression: str | None, remote: bool) -> None:
    expected = [{"id": n, "text": "x" * (n * n % 50)} for n in range(100)]
    content = "\n".join(json.dumps(row) for row in expected).encode()
    suffix = {None: "", "gzip": ".gz", "zstd": ".zst"}[compression]
    if compression is not None:
        half = content.index(b"\n", len(content) // 2) + 1
        # As two members: what appending to a compressed file makes.
        content = b"".join(_compressed(piece, compression) for piece in (content[:half], content[half:]))
    root = locate(memory_uri() if remote else str(tmp_path / "in"))
    root.child(f"a.jsonl{suffix}").write_replace(content, locate(str(tmp_path / "tmp")) if not remote else root)
    found = plan_input([root.uri], None, 7)
    assert read(found).to_pylist() == expected
    shard, reader = found.plan.shards[0], JsonlReader(open_input, schema_of(found), max_idle_cursors=2)
    assert len(shard.lines or ()) > 10
    for unit in reversed(found.plan.units):
        got = reader.read_unit(shard, unit).table
        assert got.column("id").to_pylist() == list(range(unit.first_row, unit.first_row + unit.num_rows))
    reader.close()


def _compressed(content: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, compression) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.usefixtures("small_blocks")
def test_a_unit_costs_its_own_bytes_whatever_lies_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(write_lines(tmp_path / "a.jsonl", [{"id": n} for n in range(1000)]))
    fetched: list[int] = []
    read_range = type(locate(str(tmp_path))).read_range

    def counted(self: Any, first_byte: int, num_bytes: int) -> bytes:
        fetched.append(num_bytes)
        return read_range(self, first_byte, num_bytes)

    monkeypatch.setattr(type(locate(str(tmp_path))), "read_range", counted)
    shard, unit = found.plan.shards[0], found.plan.units[-1]
    JsonlReader(open_input, schema_of(found)).read_unit(shard.for_unit(unit), unit)
    assert len(fetched) == 1
    assert fetched[0] < 400
    assert len(shard.for_unit(unit).lines or ()) < 5


@pytest.mark.usefixtures("small_blocks")
def test_units_of_a_compressed_shard_in_order_decompress_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"id": %d}\n' % n for n in range(500))))
    found = planned(tmp_path)
    opened: list[int] = []
    init = LineBytes.__init__

    def counted(self: LineBytes, *arguments: Any) -> None:
        opened.append(1)
        init(self, *arguments)

    monkeypatch.setattr(LineBytes, "__init__", counted)
    assert read(found).num_rows == 500
    assert len(opened) == 1


@pytest.mark.usefixtures("small_blocks")
def test_threads_read_units_of_compressed_shards_at_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"id": %d}\n' % n for n in range(400))))
    found = planned(tmp_path)
    reader, start = JsonlReader(open_input, schema_of(found)), threading.Barrier(6)
    shards = {shard.shard_id: shard for shard in found.plan.shards}

    def read_lane(lane: int) -> bool:
        start.wait()
        return all(
            reader.read_unit(shards[unit.shard_id], unit).table["id"][0].as_py() == unit.first_row
            for unit in found.plan.units[lane::6]
        )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read_lane, range(6)))


@pytest.mark.usefixtures("small_blocks")
def test_bad_lines_are_rows_of_their_own_with_their_numbers(tmp_path: Path) -> None:
    lines = [b'{"id": %d}' % n for n in range(60)]
    lines[5], lines[30], lines[31] = b"oops", b"", b'{"id": 1e999}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = planned(tmp_path, 8)
    assert found.plan.num_rows == 59
    assert rejections(found) == {
        5: "bad_json: line 6: Expecting value at character 1",
        30: "bad_json: line 32: the number 1e999 is beyond a float64",
    }
    reader, shard = JsonlReader(open_input, schema_of(found)), found.plan.shards[0]
    ids = [reader.read_unit(shard, unit).table["id"].to_pylist() for unit in found.plan.units]
    expected = [None if n in (5, 31) else n for n in range(60) if n != 30]
    assert [each for unit in ids for each in unit] == expected


def test_a_value_that_does_not_fit_its_column_is_a_bad_row_not_a_bad_unit(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 5}, {"text": "b"}, {"text": ["x" * 100]}])
    found = planned(tmp_path, expected={"text": pa.string()})
    reader, shard = JsonlReader(open_input, schema_of(found)), found.plan.shards[0]
    rows = reader.read_unit(shard, found.plan.units[0])
    assert rows.table.to_pydict() == {"text": ["a", None, "b", None]}
    assert str(rows.rejected[1]) == "bad_value: line 2: column 'text' is 5, expected string"
    assert len(rows.rejected[3].error) < 150


def test_a_column_that_is_asked_for_as_text_keeps_its_json(tmp_path: Path) -> None:
    bodies = [{"model": "m", "n": 1}, {"n": 2.5, "x": [1, "a", {"z": 2**80}]}, "text", None, [1]]
    write_lines(tmp_path / "a.jsonl", [{"body": body} for body in bodies] + [{"other": 1}])
    found = planned(tmp_path, json_text_columns=("body",))
    table = read(found)
    assert table.schema.field("body").type == pa.string()
    texts = table["body"].to_pylist()
    assert [None if text is None else json.loads(text) for text in texts] == [*bodies, None]


# Damage ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:600],
        lambda content: content[:620] + b"7" + content[621:],
        lambda content: b"",
    ],
    ids=["truncated", "one byte", "empty"],
)
def test_a_shard_changed_since_the_plan_gives_the_rows_before_the_change(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"id": n} for n in range(100)])
    found = planned(tmp_path, 100)
    path.write_bytes(change(path.read_bytes()))
    rows = JsonlReader(open_input, schema_of(found)).read_unit(found.plan.shards[0], found.plan.units[0])
    ids = rows.table["id"].to_pylist()
    assert ids == list(range(len(ids)))
    assert rows.num_missing == 100 - len(ids) > 0
    assert "not those that were planned: it was changed since" in str(rows.error)
    if len(path.read_bytes()) > 600:
        assert len(ids) > 30


def test_a_compressed_shard_damaged_since_the_plan_is_corrupt_not_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"id": %d}\n' % n for n in range(5000))))
    found = planned(tmp_path, 5000)
    path.write_bytes(path.read_bytes()[:2000])
    rows = JsonlReader(open_input, schema_of(found)).read_unit(found.plan.shards[0], found.plan.units[0])
    assert rows.num_missing == 5000
    assert "shard a.jsonl.gz: ends after 2000 of" in str(rows.error)


def test_a_planned_shard_that_is_not_here_makes_no_dead_letters(tmp_path: Path) -> None:
    found = planned(write_lines(tmp_path / "a.jsonl", [{"id": 1}]))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(StorageUnavailable, match=r"shard a\.jsonl was planned but cannot be read here"):
        JsonlReader(open_input, schema_of(found)).read_unit(found.plan.shards[0], found.plan.units[0])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]\n', "none of its 2 lines is a JSON object.*jq -c"),
        ("a.jsonl", b"PAR1\0\0\0", "none of its 1 lines is a JSON object"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be decompressed: Truncated compressed stream"),
        ("a.jsonl.gz", b'{"a": 1}\n', "cannot be decompressed"),
        ("a.jsonl.zst", b'{"a": 1}\n', "cannot be decompressed"),
    ],
)
def test_a_file_that_is_no_json_lines_is_an_unreadable_shard(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    write_lines(tmp_path / "b.jsonl", [{"a": 1}])
    found = planned(tmp_path)
    assert [shard.path for shard in found.plan.shards] == ["b.jsonl"]
    assert re.search(says, found.plan.unreadable[0].error)


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_stream, "MAX_LINE_BYTES", 3 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "' + b"x" * (40 << 20))
    source = FileBytes(open_input(str(tmp_path / "a.jsonl")), 40 << 20)
    with pytest.raises(ShardCorrupt, match=r"a line is longer than 3 MiB.*one JSON document\?"):
        list(blocks(LineBytes(source, None)))
    assert source._position <= 8 << 20


def test_storage_that_fails_ends_planning_even_inside_a_decompressor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))

    def failing(self: object, first_byte: int, num_bytes: int) -> bytes:
        raise StorageUnavailable("gone")

    monkeypatch.setattr(type(locate(str(tmp_path))), "read_range", failing)
    with pytest.raises(StorageUnavailable, match="gone"):
        planned(tmp_path)


# Identity ------------------------------------------------------------------------------------------------


def test_shard_ids_follow_path_size_and_content_and_no_root(tmp_path: Path) -> None:
    def identity(root: str, content: bytes, name: str = "a.jsonl") -> str:
        path = tmp_path / root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found = planned(path.parent)
        path.unlink()
        return found.plan.shards[0].shard_id

    first = identity("x", b'{"a": 1}\n{"a": 2}\n')
    assert identity("y", b'{"a": 1}\n{"a": 2}\n') == first
    others = [
        identity("x", b'{"a": 1}\n{"a": 3}\n'),
        identity("x", b'{"a": 1}\n{"a": 2}\n\n'),
        identity("x", b'{"a": 1}\n{"a": 2}\n', "b.jsonl"),
    ]
    assert len({first, *others}) == 4
    zipped = gzip.compress(b'{"a": 1}\n' * 1000)
    assert identity("x", zipped, "a.jsonl.gz") != identity("x", zipped + b"", "a.ndjson.gz")


@pytest.mark.usefixtures("small_blocks")
def test_types_columns_and_ids_do_not_depend_on_how_fast_blocks_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = [{"a": 1}, {"b": [1.5], "a": None}, {"c": {"x": "y"}}, {"b": [1]}, {"c": {"z": True}, "a": 2**60}]
    write_lines(tmp_path / "a.jsonl", [chance[n * n % 5] | {f"k{n // 40}": n} for n in range(200)])
    first = planned(tmp_path)
    scan_block = jsonl_scan._scan_block

    def hesitant(block: bytes, *arguments: Any) -> Any:
        threading.Event().wait((len(block) % 7) / 2000)
        return scan_block(block, *arguments)

    monkeypatch.setattr(jsonl_scan, "_scan_block", hesitant)
    again = planned(tmp_path)
    assert again.schemas[0].schema == first.schemas[0].schema
    assert again.plan == first.plan
    assert again.plan.shards[0].lines == first.plan.shards[0].lines


def test_the_lines_of_a_unit_are_few_and_enough() -> None:
    lines = LineBlocks(
        first_rows=array("q", [0, 3, 3, 10, 12]),
        first_lines=array("q", [1, 4, 6, 13, 15]),
        first_bytes=array("q", [0, 30, 32, 100, 120]),
        checksums=array("L", [1, 2, 3, 4]),
        are_sound=b"\1\1\0\1",
    )
    assert list(lines.holding(0, 3).checksums) == [1]
    assert list(lines.holding(2, 2).checksums) == [1, 2, 3]
    assert list(lines.holding(3, 7).checksums) == [3]
    assert list(lines.holding(3, 8).first_bytes) == [32, 100, 120]
    shard = Shard("s" * 16, "a", "/a", 12, 120, 5, lines)
    unit = WorkUnit("s" * 16, 10, 2)
    assert shard.for_unit(unit) == shard
    assert list((shard.for_unit(unit).lines or lines).checksums) == [4]
    assert shard.for_unit(unit).for_unit(unit).lines == shard.for_unit(unit).lines


def test_a_parquet_and_a_json_lines_input_go_through_one_reader(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "a.parquet")
    found = planned(tmp_path)
    assert found.plan.shards[0].lines is None
    assert read(found).equals(
        ParquetReader(open_input, schema_of(found)).read_unit(found.plan.shards[0], found.plan.units[0]).table
    )


def test_numbers_at_the_edges_come_out_exact(tmp_path: Path) -> None:
    exact = [2**53 + 1, -(2**63), 2**63 - 1]
    write_lines(
        tmp_path / "a.jsonl",
        [{"wide": n, "both": b, "huge": 2**64, "f": 1e-320} for n, b in zip(exact, (1, 2.5, 3), strict=True)],
    )
    table = read(planned(tmp_path))
    assert table["wide"].to_pylist() == exact
    assert table["both"].type == pa.float64()
    assert table["huge"].to_pylist() == [str(2**64)] * 3
    assert math.isclose(table["f"][0].as_py(), 1e-320)
    assert os.path.getsize(tmp_path / "a.jsonl") == planned(tmp_path).plan.shards[0].size_bytes


def test_parse_lines_of_sound_lines_takes_the_fast_way_only_without_texts() -> None:
    lines = [b'{"a": 1}', b'{"a": 2}']
    assert parse_lines(lines, pa.schema([("a", pa.int64())]), True).table.to_pydict() == {"a": [1, 2]}
    text = pa.field("a", pa.string(), metadata={jsonl_values.JSON_TEXT: b"integers and strings"})
    assert parse_lines(lines, pa.schema([text]), True).table.to_pydict() == {"a": ["1", "2"]}
