import subprocess
import sys
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine import sampler
from batchinfer.engine.randomness import random_bits, stream_key, uniform

KEYS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**20)


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def test_random_bits_are_splitmix64() -> None:
    # The first outputs of splitmix64 seeded with 1234567, as published with Vigna's reference code.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [random_bits(1234567, position) for position in range(4)] == expected


@given(st.lists(st.tuples(KEYS, POSITIONS), min_size=1, max_size=20))
def test_torch_twin_is_equal_bit_for_bit(pairs: list[tuple[int, int]]) -> None:
    keys = torch.tensor([signed(key) for key, _ in pairs])
    positions = torch.tensor([position for _, position in pairs])
    assert sampler.uniform(keys, positions).tolist() == [uniform(key, position) for key, position in pairs]


@given(KEYS, POSITIONS)
def test_uniform_is_in_the_half_open_unit_interval(key: int, position: int) -> None:
    assert 0.0 <= uniform(key, position) < 1.0


def test_uniform_fills_its_interval_evenly() -> None:
    key = stream_key(0, "shard:0", 0)
    counts = [0] * 10
    for position in range(20_000):
        counts[int(10 * uniform(key, position))] += 1
    # Chi-square with 9 degrees of freedom: 27.9 is the 0.1 % point.
    assert sum((count - 2000) ** 2 / 2000 for count in counts) < 27.9


def test_stream_keys_differ_in_each_of_seed_row_and_sample() -> None:
    triples = {(seed, f"s:{row}", sample) for seed in (-1, 0, 1, 10) for row in (0, 1, 10) for sample in (0, 1, 10)}
    assert len({stream_key(*triple) for triple in triples}) == len(triples)


def test_neighbouring_streams_are_uncorrelated() -> None:
    keys = [stream_key(7, f"s:{row}", 0) for row in range(2000)]
    draws = [uniform(key, 0) - 0.5 for key in keys]
    correlation = sum(a * b for a, b in pairwise(draws)) / len(draws) * 12
    assert abs(correlation) < 0.1


def test_randomness_and_the_fake_engine_import_no_torch() -> None:
    code = (
        "import sys; import batchinfer.engine.fake, batchinfer.engine.stopping, "
        "batchinfer.engine.batching; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_turns_have_streams_of_their_own_and_the_first_one_that_of_a_row_without_turns() -> None:
    assert stream_key(3, "s:1", 2, turn=0) == stream_key(3, "s:1", 2)
    fours = [
        (seed, row, sample, turn)
        for seed in (1, 12)
        for row in ("1", "2\0 1")
        for sample in (0, 1)
        for turn in (0, 1, 2)
    ]
    assert len({stream_key(*four) for four in fours}) == len(fours)
