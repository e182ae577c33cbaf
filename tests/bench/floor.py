"""The least time a workload could take: its matrix work, then its reads of keys and values, one after the other.

What is left out, no engine can do without either: weights are read, scores are formed, tokens are sampled. What all
rows have in front of them is read once: as a prompt in one row, as keys and values once a step.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch.nn import functional
from workloads import BenchRow

_BYTES_PER_VALUE = 2
_NUM_TRIALS = 9
#: Tokens of the product that is timed: enough to be limited by arithmetic, few enough to stay in a core's cache.
_NUM_TOKENS = 256
#: Far beyond any cache.
_NUM_READ_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device can do: bfloat16 arithmetic in matrix products, and reading memory."""

    flops_per_s: float
    bytes_per_s: float


#: Measured on an H100: the fastest products of EXAONE 3.0's layers, and copies on the device.
H100 = Rates(flops_per_s=800e12, bytes_per_s=3.0e12)


def measured_rates(shape: Mapping[str, object], clock: Callable[[], float]) -> Rates:
    """The CPU's rates with this process's threads: the best of a few products of the MLP's first size, and of sums."""
    from batchinfer.engine.linear import linear

    tokens = torch.ones(_NUM_TOKENS, _int(shape, "hidden_size"), dtype=torch.bfloat16)
    weight = torch.ones(2 * _int(shape, "intermediate_size"), tokens.shape[1], dtype=torch.bfloat16)
    product = linear(weight)
    values = torch.ones(_NUM_READ_BYTES // 4)
    with torch.inference_mode():
        product_s = min(
            _seconds(lambda: product(tokens), clock), _seconds(lambda: functional.linear(tokens, weight), clock)
        )
        read_s = _seconds(lambda: values.sum(), clock)
    return Rates(2 * _NUM_TOKENS * weight.numel() / product_s, _NUM_READ_BYTES / read_s)


def floor_s(shape: Mapping[str, object], rows: SequenceOf[BenchRow], rates: Rates) -> float:
    """Seconds that these rows take at these rates."""
    hidden, inner, head_dim = _int(shape, "hidden_size"), _int(shape, "intermediate_size"), _int(shape, "head_dim")
    num_queries, num_keys = _int(shape, "num_attention_heads"), _int(shape, "num_key_value_heads")
    num_layers, vocab_size = _int(shape, "num_hidden_layers"), _int(shape, "vocab_size")
    layer = hidden * head_dim * (2 * num_queries + 2 * num_keys) + 3 * hidden * inner
    place_bytes = 2 * num_layers * num_keys * head_dim * _BYTES_PER_VALUE
    num_shared = _num_shared([row.prompt for row in rows])
    # The last token of a row is sampled and not read.
    num_read = num_shared + sum(len(row.prompt) - num_shared + row.num_new_tokens - 1 for row in rows)
    num_sampled = sum(row.num_new_tokens for row in rows)
    matrix_flops = 2 * (num_layers * layer * num_read + vocab_size * hidden * num_sampled)
    places = num_shared * max(row.num_new_tokens for row in rows)
    for row in rows:
        # The first new token comes from the prompt's own pass; each further one reads one place more.
        num_decoded = row.num_new_tokens - 1
        places += num_decoded * (len(row.prompt) - num_shared) + num_decoded * (num_decoded + 1) // 2
    return matrix_flops / rates.flops_per_s + places * place_bytes / rates.bytes_per_s


def _num_shared(prompts: SequenceOf[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with."""
    shortest = min(map(len, prompts))
    return next((index for index in range(shortest) if len({prompt[index] for prompt in prompts}) > 1), shortest)


def _int(shape: Mapping[str, object], name: str) -> int:
    value = shape[name]
    assert isinstance(value, int)
    return value


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    call()
    best_s = float("inf")
    for _ in range(_NUM_TRIALS):
        started_s = clock()
        call()
        best_s = min(best_s, clock() - started_s)
    return best_s
