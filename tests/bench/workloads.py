"""Offline workloads for the engine benches: token ids in, hidden ends out. Standard library only.

An engine may plan by ``max_new_tokens`` alone; where a row really ends is told to nobody before it gets there, as
an end-of-sequence token would (random weights never emit one at a sensible place).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One prompt, what its engine is told, and where it ends."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    num_new_tokens: int


def _ids(rng: random.Random, num: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(vocab_size // 50, vocab_size - vocab_size // 50) for _ in range(num))


def _lognormal(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return max(low, min(high, round(median * rng.lognormvariate(0.0, sigma))))


def chat(num_rows: int, vocab_size: int, seed: int = 0) -> list[BenchRow]:
    """Skewed lengths: median 120 in (sigma 1) and 180 out (sigma 0.8), 16 to 1024, told 1024."""
    rng = random.Random(seed)
    return [
        BenchRow(_ids(rng, _lognormal(rng, 120, 1.0, 16, 1024), vocab_size), 1024, _lognormal(rng, 180, 0.8, 16, 1024))
        for _ in range(num_rows)
    ]


def synth(num_rows: int, vocab_size: int, seed: int = 1) -> list[BenchRow]:
    """One prefix of 512 tokens shared by all, 64 own tokens, 256 out."""
    rng = random.Random(seed)
    prefix = _ids(rng, 512, vocab_size)
    return [BenchRow(prefix + _ids(rng, 64, vocab_size), 256, 256) for _ in range(num_rows)]


def label(num_rows: int, vocab_size: int, seed: int = 2) -> list[BenchRow]:
    """1,024 to 2,048 in, 8 out."""
    rng = random.Random(seed)
    return [BenchRow(_ids(rng, rng.randrange(1024, 2048), vocab_size), 8, 8) for _ in range(num_rows)]


def skewed(num_rows: int, vocab_size: int, seed: int = 0) -> list[BenchRow]:
    """For CPUs: lognormal (sigma 1), median 40 in and 40 out, at most 256, told 256."""
    rng = random.Random(seed)
    return [
        BenchRow(_ids(rng, _lognormal(rng, 40, 1.0, 1, 256), vocab_size), 256, _lognormal(rng, 40, 1.0, 1, 256))
        for _ in range(num_rows)
    ]


def equal(num_rows: int, vocab_size: int, seed: int = 3) -> list[BenchRow]:
    """Nothing to gain from: 32 in and 32 out for every row, no sharing."""
    rng = random.Random(seed)
    return [BenchRow(_ids(rng, 32, vocab_size), 32, 32) for _ in range(num_rows)]


WORKLOADS: dict[str, Callable[[int, int], list[BenchRow]]] = {
    "chat": chat,
    "synth": synth,
    "label": label,
    "skewed": skewed,
    "equal": equal,
}
