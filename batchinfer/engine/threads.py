"""How many threads a model on CPUs should use: measured, because the number of cores does not tell.

A step is thousands of short operations, and after each all threads wait for the last one. Where another process, or
another guest of the same host, takes a core away now and then, two threads can be ten times slower than one.
"""

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

#: One trial: products of a small model's size, one after the other.
_NUM_PRODUCTS = 60
_NUM_TRIALS = 7


def settle_num_threads() -> int:
    """Let torch use all the threads it would, or one where that is faster; the choice. Takes some 0.2 s."""
    all_threads = torch.get_num_threads()
    if all_threads == 1:
        return 1
    trials: dict[int, list[float]] = {1: [], all_threads: []}
    x_TI = torch.ones(64, 576, dtype=torch.bfloat16)
    weight_OI = torch.ones(576, 576, dtype=torch.bfloat16)
    for _ in range(_NUM_TRIALS):
        for num_threads, seconds in trials.items():
            torch.set_num_threads(num_threads)
            started_s = time.perf_counter()
            for _ in range(_NUM_PRODUCTS):
                torch.nn.functional.linear(x_TI, weight_OI)
            seconds.append(time.perf_counter() - started_s)
    chosen = fewest_worst(trials)
    torch.set_num_threads(chosen)
    return chosen


def fewest_worst(trials: Mapping[int, SequenceOf[float]]) -> int:
    """The number of threads whose second-worst trial is best: a rare stall counts, a single one does not."""
    return min(trials, key=lambda num_threads: sorted(trials[num_threads])[-2])
