"""The reader of a job's input, whatever format its shards have."""

from collections.abc import Callable

import pyarrow as pa

from batchinfer.records import Shard, WorkUnit
from batchinfer.storage.jsonl_reader import JsonlReader
from batchinfer.storage.location import Location
from batchinfer.storage.reader import ParquetReader, UnitRows


class ShardReader:
    """Reads units of any shards of a plan; the formats' own readers say what that costs and what it raises."""

    def __init__(self, locate: Callable[[str], Location], schema: pa.Schema) -> None:
        """``locate`` turns a shard's uri into its location; columns outside ``schema`` are not read."""
        self._parquet = ParquetReader(locate, schema)
        self._jsonl = JsonlReader(locate, schema)

    def read_unit(self, shard: Shard, unit: WorkUnit) -> UnitRows:
        """The unit's rows up to the first damaged one. May be repeated, in any order, by several threads at once."""
        reader = self._parquet if shard.lines is None else self._jsonl
        return reader.read_unit(shard, unit)

    def close(self) -> None:
        """Close what is kept open between units; the reader may be used again."""
        self._parquet.close()
        self._jsonl.close()
