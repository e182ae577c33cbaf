"""Parquet footers, read alone: what a file holds without reading what it holds."""

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
    tail = location.read_range(max(0, size_bytes - _TAIL_BYTES), min(size_bytes, _TAIL_BYTES))
    if len(tail) < _END_BYTES + len(_MAGIC) or tail[-4:] != _MAGIC:
        raise ShardCorrupt("no Parquet footer at its end: truncated, still being written, or no Parquet file")
    num_footer_bytes = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if num_footer_bytes + len(_MAGIC) > size_bytes:
        raise ShardCorrupt(f"its footer claims {num_footer_bytes} bytes of {size_bytes}")
    if num_footer_bytes > len(tail):
        tail = location.read_range(size_bytes - num_footer_bytes, num_footer_bytes)
    footer = tail[-num_footer_bytes:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(footer))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardCorrupt(f"its footer cannot be decoded: {str(error).partition(chr(10))[0]}") from error
    if _num_bytes_of_rows(metadata) > size_bytes - num_footer_bytes:
        raise ShardCorrupt("shorter than its footer says: bytes are missing before the footer")
    return footer, metadata


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
