"""How attention is cut up: pure integers, so every claim is checked over a range of sizes."""

import pytest

from batchinfer.engine.kernel_shapes import DeviceLimits, num_tiles, power_of_two

H100 = DeviceLimits(num_multiprocessors=132, shared_bytes=227 << 10)
SMALL = DeviceLimits(num_multiprocessors=20, shared_bytes=48 << 10)


def test_the_shapes_measured_on_an_h100() -> None:
    assert H100.decode_tile(512, group=4, dim=128, element_bytes=2) == (16, 128, 4, 2)
    assert H100.decode_tile(64, group=4, dim=128, element_bytes=2) == (16, 64, 4, 3)
    assert H100.keys_per_split(num_rows=512, num_kv_heads=8, max_length=1500) >= 1500


@pytest.mark.parametrize("limits", [H100, SMALL])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_tiles_fit_and_are_powers_of_two(limits: DeviceLimits, dim: int, element_bytes: int) -> None:
    tiles = [limits.decode_tile(rows, group, dim, element_bytes) for rows in (1, 127, 128) for group in (1, 5, 32)]
    tiles += [
        limits.tile(queries, dim, element_bytes, at_least) for queries in (1, 64, 4096) for at_least in (1, 16, 32)
    ]
    for num_queries, num_keys, _, num_stages in tiles:
        assert power_of_two(num_queries) == num_queries >= 16
        assert power_of_two(num_keys) == num_keys >= 16
        row_bytes = power_of_two(dim) * element_bytes
        assert num_keys == 16 or (num_queries + 2 * num_stages * num_keys) * row_bytes <= limits.shared_bytes


@pytest.mark.parametrize("num_rows", [1, 3, 16, 512, 5000])
@pytest.mark.parametrize("max_length", [1, 256, 257, 4096, 100_000])
def test_splits_are_whole_tiles_and_their_scratch_memory_is_bounded(num_rows: int, max_length: int) -> None:
    keys = H100.keys_per_split(num_rows, 8, max_length)
    assert keys >= 256
    assert keys % 128 == 0
    num_splits = num_tiles(max_length, keys)
    assert num_splits <= 32
    assert num_splits == 1 or num_splits * num_rows <= 4096


def test_one_long_row_is_spread_over_the_device() -> None:
    assert num_tiles(8192, H100.keys_per_split(1, 8, 8192)) * 8 >= 132


def test_a_prefix_is_split_only_where_the_device_has_room() -> None:
    assert H100.num_prefix_splits(num_programs=8, max_length=8192) == 16
    assert H100.num_prefix_splits(num_programs=8, max_length=300) == 1
    assert H100.num_prefix_splits(num_programs=264, max_length=8192) == 1


def test_powers_of_two() -> None:
    assert [power_of_two(number) for number in (1, 2, 3, 80, 128)] == [1, 2, 4, 128, 128]
