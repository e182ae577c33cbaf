"""Where a Parquet shard can be entered, and what decoding it costs; from its footer."""

from collections.abc import Collection
from dataclasses import dataclass

from batchinfer.records import Shard
from batchinfer.storage.footer import read_footer
from batchinfer.storage.location import Location


@dataclass(frozen=True, slots=True)
class RowGroups:
    """``starts`` are the first rows of the row groups and, last, the shard's number of rows."""

    starts: tuple[int, ...]
    #: Of the columns asked for, decoded.
    bytes_per_row: float


def read_row_groups(location: Location, shard: Shard, columns: Collection[str]) -> RowGroups:
    """The row groups of a shard. Raises ShardCorrupt or pa.ArrowException for a footer that cannot be read."""
    _, metadata = read_footer(location, shard.size_bytes)
    starts, num_bytes = [0], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        starts.append(starts[-1] + group.num_rows)
        for number in range(group.num_columns):
            column = group.column(number)
            # Nested columns are stored by their leaves: messages.list.element.content.
            if column.path_in_schema.partition(".")[0] in columns:
                num_bytes += column.total_uncompressed_size
    return RowGroups(tuple(starts), num_bytes / max(1, starts[-1]))
