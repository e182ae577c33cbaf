"""Rows of work units: whatever the row groups, in any order, from any thread, up to the damage."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InputError, ShardCorrupt, StorageUnavailable
from batchinfer.planner import plan_input
from batchinfer.records import Shard, WorkUnit
from batchinfer.storage.filesystem import locate
from batchinfer.storage.reader import ParquetReader
from tests.outputs import NO_WAIT, memory_uri, planned, rows_table, write_shard

SCHEMA = rows_table(0).schema
open_input = partial(locate, blames=InputError, policy=NO_WAIT)


def expected(unit: WorkUnit) -> pa.Table:
    return rows_table(unit.num_rows, unit.first_row)


def damage_page(path: Path, row: int, column: str = "text") -> None:
    """Flip a byte in the page that holds ``row`` (its value must appear verbatim: no compression, no dictionary)."""
    content = bytearray(path.read_bytes())
    at = content.index(f"row {row}".encode())
    content[at] ^= 0xFF
    path.write_bytes(content)


def damaged_shard(path: Path, row: int, num_rows: int = 5000, row_group_size: int = 2500) -> Shard:
    """A shard with pages of some hundred rows, one of which fails its checksum."""
    pq.write_table(
        rows_table(num_rows),
        path,
        row_group_size=row_group_size,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=2048,
        write_batch_size=64,
        write_page_checksum=True,
    )
    shard = planned(path, 1000).shards[0]
    damage_page(path, row)
    return shard


@pytest.fixture
def reader() -> ParquetReader:
    return ParquetReader(open_input, SCHEMA)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 5000),
    row_group_size=st.integers(100, 5000),
    rows_per_unit=st.integers(50, 3000),
    order=st.randoms(use_true_random=False),
)
def test_every_cut_of_every_file_gives_exactly_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    row_group_size: int,
    rows_per_unit: int,
    order: random.Random,
) -> None:
    path = write_shard(tmp_path_factory.mktemp("in") / "a.parquet", num_rows, row_group_size=row_group_size)
    shard = planned(path, rows_per_unit).shards[0]
    reader = ParquetReader(open_input, SCHEMA, max_idle_cursors=2)
    units = list(shard.units)
    if order.random() < 0.5:
        order.shuffle(units)
    for unit in units:
        read = reader.read_unit(shard, unit)
        assert (read.error, read.num_missing) == (None, 0)
        assert read.table.equals(expected(unit))
    reader.close()


def test_units_in_order_decode_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = planned(write_shard(tmp_path / "a.parquet", 20_000), 1000).shards[0]
    streams: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: object, **kwargs: object) -> object:
        streams.append(1)
        return iter_batches(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    reader = ParquetReader(open_input, SCHEMA)
    for unit in shard.units:
        assert reader.read_unit(shard, unit).table.equals(expected(unit))
    assert len(streams) == 1


def test_row_groups_before_the_unit_are_not_read(tmp_path: Path) -> None:
    """A damaged first row group is no obstacle for a unit of the second."""
    shard = damaged_shard(tmp_path / "a.parquet", row=10)
    read = ParquetReader(open_input, SCHEMA).read_unit(shard, WorkUnit(shard.shard_id, 2500, 700))
    assert read.error is None
    assert read.table.equals(rows_table(700, 2500))


def test_threads_read_units_of_one_shard_at_once(tmp_path: Path, reader: ParquetReader) -> None:
    shards = [
        planned(write_shard(tmp_path / f"{k}.parquet", 5000, row_group_size=1700), 100).shards[0] for k in range(2)
    ]
    start = threading.Barrier(8)

    def read(lane: int) -> bool:
        start.wait()
        work = [(shard, unit) for shard in shards for unit in shard.units[lane::8]]
        return all(reader.read_unit(shard, unit).table.equals(expected(unit)) for shard, unit in work)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(reader._idle) <= 4


def test_only_the_schemas_columns_come_in_its_order_and_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "unused": [0, 1],
            "large": pa.array(["a", None], pa.large_string()),
            "nothing": pa.nulls(2),
            "messages": [[{"role": "user", "content": "hi"}], None],
        }
    )
    pq.write_table(table, path)
    schema = pa.schema(
        [("messages", table.schema.field("messages").type), ("large", pa.string()), ("nothing", pa.int64())]
    )
    shard = planned(path).shards[0]
    read = ParquetReader(open_input, schema).read_unit(shard, shard.units[0])
    assert read.table.schema == schema
    assert read.table.to_pydict() == {
        "messages": [[{"role": "user", "content": "hi"}], None],
        "large": ["a", None],
        "nothing": [None, None],
    }


@pytest.mark.parametrize("damaged_row", [0, 1, 1000, 1037, 2499])
def test_rows_before_the_damage_are_read_and_the_rest_is_named(tmp_path: Path, damaged_row: int) -> None:
    shard = damaged_shard(tmp_path / "a.parquet", damaged_row)
    reader = ParquetReader(open_input, SCHEMA)
    good = 0
    for unit in shard.units:
        read = reader.read_unit(shard, unit)
        assert read.table.num_rows + read.num_missing == unit.num_rows
        assert read.table.equals(rows_table(read.table.num_rows, unit.first_row))
        if read.num_missing:
            assert isinstance(read.error, ShardCorrupt)
            assert str(read.error).startswith("shard a.parquet: row ")
            assert "row group 0 cannot be read" in str(read.error)
        else:
            assert read.error is None
            good += 1
    # A page holds under 400 rows, so no more of the readable rows than that may be lost before the damaged one;
    # the second row group loses none: units 3 and 4 are whole (unit 2 spans both groups).
    first_bad = reader._damage[shard.shard_id, 0][0]
    assert damaged_row - 400 < first_bad <= damaged_row
    assert good >= 2


def test_units_before_the_damage_are_whole_though_a_batch_reaches_into_it(tmp_path: Path) -> None:
    """Rows are decoded 1024 at a time, so damage in row 600 fails the batch that units 0 to 4 are cut from."""
    shard = damaged_shard(tmp_path / "a.parquet", 600)
    reader = ParquetReader(open_input, SCHEMA)
    first_bad = None
    for first_row in range(0, 2500, 100):
        unit = WorkUnit(shard.shard_id, first_row, 100)
        read = reader.read_unit(shard, unit)
        assert read.table.equals(rows_table(read.table.num_rows, first_row))
        if read.num_missing and first_bad is None:
            first_bad = first_row + read.table.num_rows
        assert read.num_missing == (0 if first_bad is None else min(100, first_row + 100 - first_bad))
    assert first_bad is not None
    assert 200 < first_bad <= 600


def test_damage_is_looked_for_once(tmp_path: Path) -> None:
    shard = damaged_shard(tmp_path / "a.parquet", 10)
    reader = ParquetReader(open_input, SCHEMA)
    first = reader.read_unit(shard, WorkUnit(shard.shard_id, 1000, 500))
    assert first.num_missing == 500
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    write_shard(tmp_path / "a.parquet", 5000, row_group_size=2500)
    assert reader.read_unit(shard, WorkUnit(shard.shard_id, 1500, 500)).num_missing == 500


def test_a_shard_truncated_after_planning_gives_no_rows_but_an_error(tmp_path: Path, reader: ParquetReader) -> None:
    path = write_shard(tmp_path / "a.parquet", 100)
    shard = planned(path).shards[0]
    path.write_bytes(path.read_bytes()[:-20])
    read = reader.read_unit(shard, shard.units[0])
    assert (read.table.num_rows, read.num_missing) == (0, 10)
    assert read.table.schema == SCHEMA
    assert "shard a.parquet: " in str(read.error)


def test_a_shard_replaced_after_planning_is_not_read_as_if_it_were_the_old_one(
    tmp_path: Path, reader: ParquetReader
) -> None:
    shard = planned(write_shard(tmp_path / "a.parquet", 100)).shards[0]
    write_shard(tmp_path / "a.parquet", 90)
    read = reader.read_unit(shard, shard.units[0])
    assert read.num_missing == 10
    assert "has 90 rows, was planned with 100" in str(read.error)


def test_a_planned_shard_that_is_not_here_makes_no_dead_letters(tmp_path: Path, reader: ParquetReader) -> None:
    shard = planned(write_shard(tmp_path / "a.parquet", 100)).shards[0]
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(StorageUnavailable, match=r"shard a\.parquet was planned but cannot be read here: .*not found"):
        reader.read_unit(shard, shard.units[0])


def test_remote_shards_read_by_ranges(tmp_path: Path, reader: ParquetReader) -> None:
    root = memory_uri()
    content = write_shard(tmp_path / "a.parquet", 3000, row_group_size=1300).read_bytes()
    locate(root).child("in/a.parquet").write_replace(content, locate(root).child("tmp"))
    shard = plan_input([f"{root}/in"], None, 1000).plan.shards[0]
    for unit in shard.units:
        assert reader.read_unit(shard, unit).table.equals(expected(unit))


def test_storage_failing_while_rows_are_decoded_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: ParquetReader
) -> None:
    from batchinfer.storage.filesystem import RemoteLocation

    root = memory_uri()
    content = write_shard(tmp_path / "a.parquet", 3000).read_bytes()
    locate(root).child("a.parquet").write_replace(content, locate(root).child("tmp"))
    shard = plan_input([f"{root}/a.parquet"], None, 1000).plan.shards[0]
    read_range = RemoteLocation.read_range

    def lost(self: RemoteLocation, first_byte: int, num_bytes: int) -> bytes:
        if first_byte + num_bytes < len(content) - 1000:
            raise StorageUnavailable("the network is gone")
        return read_range(self, first_byte, num_bytes)

    monkeypatch.setattr(RemoteLocation, "read_range", lost)
    with pytest.raises(StorageUnavailable, match="the network is gone"):
        reader.read_unit(shard, shard.units[0])
    monkeypatch.undo()
    assert reader.read_unit(shard, shard.units[0]).error is None
