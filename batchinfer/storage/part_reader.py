"""A part read back whole: for what adds to it and for what copies it."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import OutputError
from batchinfer.storage.location import Location


def read_part(place: Location, wanted: Sequence[str] | None = None) -> pa.Table:
    """A part with its metadata, the checksums of its pages held against their bytes.

    Of the ``wanted`` columns those that are there, all when None. Raises OutputError for one that is no whole Parquet
    file, StorageUnavailable when the storage fails.
    """
    content = place.read_bytes()
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as part:
            present = part.schema_arrow.names
            columns = None if wanted is None else [name for name in wanted if name in present]
            return part.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{place}: damaged ({str(error).partition(chr(10))[0]}); run `batchinfer verify` on the output"
        ) from error
