"""Parquet footers, read alone: what a file holds without reading what it holds."""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import ShardCorrupt
from batchinfer.storage.location import Location

#: First read from a file's end; footers of most files fit, larger ones cost a second read.
_TAIL_BYTES = 64 * 1024
#: Footer length (4 bytes, little endian) and magic at a Parquet file's end, the magic at its beginning.
_END_BYTES = 8
_MAGIC = b"PAR1"


def read_footer(location: Location, size_bytes: int) -> tuple[bytes, pq.FileMetaData]:
    """The footer's bytes (metadata, length and magic) and what they say, in at most two ranged reads.

    Raises ShardCorrupt when the file is no whole Parquet file.
    """
    return _footer(location.read_range, size_bytes)


def footer_of(content: bytes) -> pq.FileMetaData:
    """What the footer of a whole file says. Raises ShardCorrupt when it is no whole Parquet file."""
    return _footer(lambda first_byte, num_bytes: content[first_byte : first_byte + num_bytes], len(content))[1]


def _footer(read_range: Callable[[int, int], bytes], size_bytes: int) -> tuple[bytes, pq.FileMetaData]:
    tail = read_range(max(0, size_bytes - _TAIL_BYTES), min(size_bytes, _TAIL_BYTES))
    if len(tail) < _END_BYTES + len(_MAGIC) or tail[-4:] != _MAGIC:
        raise ShardCorrupt("no Parquet footer at its end: truncated, still being written, or no Parquet file")
    num_footer_bytes = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if num_footer_bytes + len(_MAGIC) > size_bytes:
        raise ShardCorrupt(f"its footer claims {num_footer_bytes} bytes of {size_bytes}")
    if num_footer_bytes > len(tail):
        tail = read_range(size_bytes - num_footer_bytes, num_footer_bytes)
    footer = tail[-num_footer_bytes:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardCorrupt(f"its footer cannot be decoded: {str(error).partition(chr(10))[0]}") from error
    if _num_bytes_of_rows(metadata) > size_bytes - num_footer_bytes:
        raise ShardCorrupt("shorter than its footer says: bytes are missing before the footer")
    return footer, metadata


class ShardDigest:
    """The identity of an input file: its path relative to the input root, its size, and bytes that tell its content:
    a Parquet file's footer, all of a JSON Lines file. They may come in pieces."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._hash = hashlib.sha256(f"{path}\0{size_bytes}\0".encode())

    def update(self, content: bytes) -> None:
        """Take in the next bytes."""
        self._hash.update(content)

    @property
    def shard_id(self) -> str:
        return self._hash.hexdigest()[:16]


def shard_id(path: str, size_bytes: int, footer: bytes) -> str:
    """The identity of a Parquet shard."""
    digest = ShardDigest(path, size_bytes)
    digest.update(footer)
    return digest.shard_id


def key_values(metadata: pq.FileMetaData) -> dict[str, str]:
    """batchinfer's own key-value pairs of a footer, without their prefix."""
    prefix = b"batchinfer."
    return {
        key.removeprefix(prefix).decode(errors="replace"): value.decode(errors="replace")
        for key, value in (metadata.metadata or {}).items()
        if key.startswith(prefix)
    }


def _num_bytes_of_rows(metadata: pq.FileMetaData) -> int:
    """Where the last column chunk ends, as the footer has it."""
    end = 0
    if metadata.num_row_groups and metadata.num_columns:
        group = metadata.row_group(metadata.num_row_groups - 1)
        for index in range(group.num_columns):
            column = group.column(index)
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset is not None:
                start = min(start, column.dictionary_page_offset)
            end = max(end, start + column.total_compressed_size)
    return end
