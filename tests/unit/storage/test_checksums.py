"""Checksums in files: what is written holds, and any other bytes do not."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.storage import checksums
from batchinfer.storage.footer import footer_of


def parquet(num_rows: int = 50) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": range(num_rows), "b": ["x" * (k % 5) for k in range(num_rows)]}), sink)
    return sink.getvalue().to_pybytes()


def test_a_file_with_a_checksum_reads_as_one_without() -> None:
    plain = parquet()
    sealed = checksums.add_to_parquet(plain)
    assert len(sealed) == len(plain) + 80
    assert checksums.holds_in_parquet(sealed)
    assert pq.read_table(pa.BufferReader(sealed)).equals(pq.read_table(pa.BufferReader(plain)))
    assert pq.read_table(pa.BufferReader(sealed), columns=["b"], filters=[("a", ">", 40)]).num_rows == 9
    assert footer_of(sealed).num_rows == 50


def test_a_file_without_a_checksum_has_none_that_holds() -> None:
    for content in (parquet(), b"", b"PAR1", b"PAR1" * 30, b"\xff" * 200):
        assert not checksums.holds_in_parquet(content)


@given(st.data())
def test_no_changed_torn_or_longer_file_passes(data: st.DataObject) -> None:
    whole = checksums.add_to_parquet(parquet(5))
    position = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        changed = (
            whole[:position] + bytes([whole[position] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[position + 1 :]
        )
    elif kind == "cut":
        changed = whole[:position]
    else:
        changed = whole[:position] + data.draw(st.binary(min_size=1, max_size=9)) + whole[position:]
    assert checksums.holds_in_parquet(changed) == (changed == whole)


def test_every_changed_byte_of_a_json_text_is_found() -> None:
    text = checksums.add_to_json(json.dumps({"name": "작업", "n": 1}, indent=2, ensure_ascii=False))
    stated = json.loads(text).pop("checksum")
    assert list(json.loads(text)) == ["name", "n", "checksum"]
    assert checksums.holds_in_json(text, stated)
    for position in range(len(text)):
        changed = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        try:
            stated = json.loads(changed).get("checksum")
        except ValueError:
            continue
        assert not checksums.holds_in_json(changed, stated), position
