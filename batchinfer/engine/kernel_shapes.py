"""How attention is cut into programs: tile sizes, splits, warps and stages, from a device's limits and integers alone.

The shapes are those measured on an H100 for heads of 128 dims in bf16; they shrink where a tile would not fit.
"""

from dataclasses import dataclass
from typing import NamedTuple

#: Keys of one split: fewer are not worth a merge, more make one row's program outlast all the others.
_MIN_SPLIT, _MAX_SPLIT = 256, 2048
_MAX_PREFIX_SPLITS = 16
#: A power of two: one merge kernel does for all.
MAX_SPLITS = 32
#: Rows times splits: what bounds the scratch memory of a split decode (64 MiB for 32 heads of 128 dims).
_MAX_SPLIT_ROWS = 4096
#: A split is a whole number of the largest tiles.
_SPLIT_GRANULE = 128


class Tile(NamedTuple):
    """One program's queries and the keys it takes at once, and how it is compiled."""

    num_queries: int
    num_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """``shared_bytes`` is the shared memory that one program may take."""

    num_multiprocessors: int
    shared_bytes: int

    def decode_tile(self, num_rows: int, group: int, dim: int, element_bytes: int) -> Tile:
        """For the ``group`` queries of a row on one KV head; few rows leave room for more loads in flight."""
        num_queries = max(16, power_of_two(group))
        num_keys, num_stages = (128, 2) if num_rows >= 128 else (64, 3)
        return Tile(num_queries, self._fitting(num_keys, num_stages, num_queries, dim, element_bytes), 4, num_stages)

    def tile(self, num_queries: int, dim: int, element_bytes: int, at_least: int = 16) -> Tile:
        """Of ``num_queries`` queries (a power of two) or fewer, but ``at_least`` so many."""
        if element_bytes == 4:
            # No tensor cores in full precision, and larger tiles than these spill.
            return Tile(max(16, at_least), self._fitting(32, 2, 16, dim, element_bytes), 4, 2)
        padded = power_of_two(dim)
        num_queries = max(16, at_least, min(num_queries, 128 if padded <= 128 else 64))
        num_warps = 8 if num_queries * padded >= 128 * 128 else 4
        num_stages = 3 if padded <= 128 else 2
        return Tile(num_queries, self._fitting(64, num_stages, num_queries, dim, element_bytes), num_warps, num_stages)

    def keys_per_split(self, num_rows: int, num_kv_heads: int, max_length: int) -> int:
        """Half of what a multiprocessor would get if all rows were as long as the longest, within limits."""
        share = num_rows * num_kv_heads * max_length // (2 * self.num_multiprocessors)
        most_splits = min(MAX_SPLITS, max(1, _MAX_SPLIT_ROWS // num_rows))
        num_keys = max(min(max(share, _MIN_SPLIT), _MAX_SPLIT), num_tiles(max_length, most_splits))
        return num_tiles(num_keys, _SPLIT_GRANULE) * _SPLIT_GRANULE

    def num_prefix_splits(self, num_programs: int, max_length: int) -> int:
        """Enough to fill the device, unless the prefix is too short to be worth it."""
        wanted = num_tiles(2 * self.num_multiprocessors, num_programs)
        return max(1, min(wanted, max_length // _MIN_SPLIT, _MAX_PREFIX_SPLITS))

    def _fitting(self, num_keys: int, num_stages: int, num_queries: int, dim: int, element_bytes: int) -> int:
        """``num_keys`` halved until the queries and ``num_stages`` tiles of keys and values fit in shared memory."""
        row_bytes = power_of_two(dim) * element_bytes
        while num_keys > 16 and (num_queries + 2 * num_stages * num_keys) * row_bytes > self.shared_bytes:
            num_keys //= 2
        return num_keys


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def num_tiles(number: int, tile: int) -> int:
    """Tiles that cover ``number``."""
    return -(-number // tile)
