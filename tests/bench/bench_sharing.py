"""What it saves to generate identical greedy rows once, and what looking for them costs where there are none.

    python tests/bench/bench_sharing.py [--rows 64] [--new-tokens 16] [--threads 2] [--model DIRECTORY]

Units of 32 rows go one after the other through one continuous engine in float32, once each row for itself and once
sharing; of the rows 0, 50 and 90 % are repeats, spread at random. Both ways run in this process, and their tokens are
compared. The last lines time the search itself over a unit of 1,024 rows.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from batchinfer.cluster.request_sharing import RequestSharing
from batchinfer.engine.build import build_engine
from batchinfer.engine.engine import Engine, Generation, Sequence
from batchinfer.records import Prompt, SamplingParams

UNIT = 32
SHARES = (0.0, 0.5, 0.9)


def rows_with_repeats(num: int, share: float, vocab_size: int, sampling: SamplingParams) -> list[Sequence]:
    """Prompts of 20 to 60 tokens; a ``share`` of the rows repeats another one."""
    dice = random.Random(0)
    num_distinct = max(1, round(num * (1 - share)))
    distinct = [[dice.randrange(10, vocab_size) for _ in range(dice.randrange(20, 60))] for _ in range(num_distinct)]
    chosen = [*range(num_distinct), *(dice.randrange(num_distinct) for _ in range(num - num_distinct))]
    dice.shuffle(chosen)
    return [Sequence(Prompt(f"shard:{row}", distinct[index], sampling)) for row, index in enumerate(chosen)]


def drained(engine: Engine, sequences: Iterable[Sequence]) -> list[Generation]:
    engine.submit(sequences)
    ends: list[Generation] = []
    while engine.num_unfinished:
        ends += engine.step()
    return ends


def timed(
    engine: Engine, rows: list[Sequence], sharing: RequestSharing | None
) -> tuple[float, dict[str, tuple[int, ...]]]:
    """(seconds, tokens by row), unit by unit."""
    started_s = time.perf_counter()
    tokens: dict[str, tuple[int, ...]] = {}
    for first in range(0, len(rows), UNIT):
        unit = rows[first : first + UNIT]
        if sharing is None:
            ends = drained(engine, unit)
        else:
            shared = sharing.sort_out(unit)
            generated = drained(engine, shared.leaders)
            sharing.remember(shared, generated)
            ends = generated + shared.fan_out(generated)
        tokens |= {end.sequence.prompt.row_id: tuple(end.token_ids) for end in ends}
    return time.perf_counter() - started_s, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo-model"))
    arguments = parser.parse_args()
    if not arguments.model.exists():
        subprocess.run([sys.executable, "-m", "batchinfer.models.demo", str(arguments.model)], check=True)
    torch.set_num_threads(arguments.threads)
    loaded = build_engine(
        "continuous", arguments.model, dtype="float32", device="cpu", max_batch_rows=UNIT, max_batch_tokens=8192
    )
    sampling = SamplingParams(max_new_tokens=arguments.new_tokens, ignore_eos=True)
    print(f"{arguments.rows} rows, {arguments.new_tokens} new tokens each, {arguments.threads} threads, float32")
    drained(loaded.engine, rows_with_repeats(4, 0.0, loaded.vocab_size, sampling))
    print(f"{'repeats':>8} {'generated':>10} {'each for itself s':>18} {'shared s':>9} {'speed-up':>9} {'tokens':>7}")
    for share in SHARES:
        rows = rows_with_repeats(arguments.rows, share, loaded.vocab_size, sampling)
        alone_s, alone = timed(loaded.engine, rows, None)
        before = loaded.engine.stats().num_finished
        shared_s, shared = timed(loaded.engine, rows, RequestSharing())
        num_generated = loaded.engine.stats().num_finished - before
        are_equal = "equal" if shared == alone else "DIFFER"
        ratio = f"{alone_s / shared_s:>8.1f}x"
        print(f"{share:>8.0%} {num_generated:>10} {alone_s:>18.1f} {shared_s:>9.1f} {ratio} {are_equal:>7}", flush=True)
    for num_tokens in (64, 512, 2048):
        dice = random.Random(1)
        unit = [
            Sequence(Prompt(f"shard:{row}", [dice.randrange(50_000) for _ in range(num_tokens)], sampling))
            for row in range(1024)
        ]
        started_s = time.process_time()
        RequestSharing().sort_out(unit)
        used_ms = (time.process_time() - started_s) * 1000
        print(f"search in 1,024 distinct rows of {num_tokens:,} tokens: {used_ms:.0f} ms of one core")


if __name__ == "__main__":
    main()
