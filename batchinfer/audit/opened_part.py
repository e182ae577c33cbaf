"""A part opened for an audit: by ranged reads of what is asked for, or as a whole with its checksum taken."""

from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.audit.holdings import Part
from batchinfer.errors import ShardCorrupt, StorageUnavailable
from batchinfer.storage import checksums
from batchinfer.storage.checksums import read_label
from batchinfer.storage.footer import footer_of, key_values, read_footer
from batchinfer.storage.part_tables import DeadRows


@dataclass(frozen=True, slots=True)
class OpenedPart:
    """One part whose footer can be read. Used by one thread; close it."""

    part: Part
    file: pq.ParquetFile
    #: What its footer states, batchinfer's own keys.
    stated: dict[str, str]
    #: What its label says; None when it has none.
    dead_rows: DeadRows | None
    _source: "pa.NativeFile | BinaryIO"

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def columns(self) -> list[str]:
        return list(self.file.schema_arrow.names)

    def column(self, name: str) -> "pa.ChunkedArray[Any]":
        """One column, its page checksums verified. Raises ShardCorrupt when it is missing or cannot be decoded."""
        try:
            return self.file.read(columns=[name], use_threads=False).column(name)
        except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise StorageUnavailable(f"{self.name}: {error}; run verify again") from error
            raise ShardCorrupt(f"column {name}: {str(error).partition(chr(10))[0]}") from error

    def column_of_type(self, name: str, wanted: pa.DataType) -> "pa.ChunkedArray[Any]":
        """The same; ShardCorrupt as well when its type is another one."""
        found = self.column(name)
        if found.type != wanted:
            raise ShardCorrupt(f"column {name} is {found.type}, not {wanted}")
        return found

    def close(self) -> None:
        self._source.close()


def open_ranged(part: Part) -> OpenedPart:
    """Its footer now, columns as they are asked for. Raises ShardCorrupt for a footer that cannot be read."""
    try:
        metadata = read_footer(part.location, part.size_bytes)[1]
    except ShardCorrupt:
        size_bytes = part.location.size_bytes()
        if size_bytes == part.size_bytes:
            raise
        # A retry has replaced it since it was listed.
        part = replace(part, size_bytes=size_bytes)
        metadata = read_footer(part.location, size_bytes)[1]
    return _opened(part, part.location.open_random(), metadata)


def open_whole(part: Part) -> OpenedPart:
    """All its bytes, in memory until closed.

    Raises ShardCorrupt when they are not those that were written: nothing of them is decoded then, for Arrow ends the
    process over some footers with a wrong bit.
    """
    content = part.location.read_bytes()
    if not checksums.holds_in_parquet(content):
        raise ShardCorrupt("its checksum does not hold: some of its bytes are not those that were written")
    return _opened(replace(part, size_bytes=len(content)), pa.BufferReader(content), footer_of(content))


def _opened(part: Part, source: "pa.NativeFile | BinaryIO", metadata: pq.FileMetaData) -> OpenedPart:
    try:
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)
        label = read_label(part.location, part.size_bytes)
        dead_rows = DeadRows.from_label(label) if label is not None else None
        return OpenedPart(part, file, key_values(metadata), dead_rows, source)
    except (pa.ArrowException, OSError) as error:
        source.close()
        raise ShardCorrupt(str(error).partition("\n")[0]) from error
    except BaseException:
        source.close()
        raise
