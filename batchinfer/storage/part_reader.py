"""A part read back whole: for what adds to it and for what copies it."""

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import OutputError
from batchinfer.storage.location import Location


def read_part(place: Location) -> pa.Table:
    """A whole part with its metadata, the checksums of its pages held against their bytes.

    Raises OutputError for one that is no whole Parquet file, StorageUnavailable when the storage fails.
    """
    try:
        return pq.read_table(pa.BufferReader(place.read_bytes()), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{place}: damaged ({str(error).partition(chr(10))[0]}); run `batchinfer verify` on the output"
        ) from error
