"""Randomness as a function: one uniform number per (seed, row, sample, position), and no generator to carry.

A resumed, re-batched or re-run sequence draws the same numbers, because nothing is consumed in any order.
No torch here; ``engine.sampler`` holds the vectorised twin of :func:`uniform`, equal bit for bit.
"""

from hashlib import blake2b

#: Increment and multipliers of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MASK_64 = (1 << 64) - 1


def stream_key(seed: int, row_id: str, sample: int, turn: int = 0) -> int:
    """Key of one sequence's stream, 0 <= key < 2**64: blake2b over the four, each delimited.

    The first three written are numbers, which cannot contain a delimiter, so no two fours share a text. A row's only
    turn, its first one, is left out.
    """
    numbers = f"{seed}\0{sample}.{turn}" if turn else f"{seed}\0{sample}"
    text = f"{numbers}\0{row_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8, person=b"batchinfer").digest(), "little")


def random_bits(key: int, position: int) -> int:
    """64 random bits at ``position`` of the stream: the (position+1)-th output of splitmix64 started at ``key``."""
    bits = (key + (position + 1) * GOLDEN_GAMMA) & MASK_64
    bits = ((bits ^ (bits >> 30)) * MIX_1) & MASK_64
    bits = ((bits ^ (bits >> 27)) * MIX_2) & MASK_64
    return bits ^ (bits >> 31)


def uniform(key: int, position: int) -> float:
    """A float64 in [0, 1) with 53 random bits."""
    return (random_bits(key, position) >> 11) * 2.0**-53
