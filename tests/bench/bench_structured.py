"""What holding completions to a schema costs: the same rows with and without one, side by side in one process.

    python tests/bench/bench_structured.py [--workload skewed] [--rows 128] [--rounds 3] [--threads 1] [--clock cpu]

One engine, random weights in a shape's exact sizes, the tokenizer of a model directory that fits the shape. Rows end at
their hidden lengths (an array without an end is the schema), so that both sides read and write as many tokens;
``mixed`` holds every other row. Rounds alternate. The first round also pays for the tokenizer and the lexer's states,
and is not counted. ``in masks`` is the share of the time in what only rows with a schema need (masks, their use on the
logits, the matchers' tokens): it is steady where the machine is not.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench_engine import CLOCKS, SHAPES, HiddenEnd, llama_config
from workloads import WORKLOADS, BenchRow

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "kind": {"enum": ["person", "place", "서울", "thing"]},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "kind", "score", "tags", "ok"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 10_000}
SIDES = ("plain", "schema", "mixed")


class Stopwatch:
    """Counts the time spent in some methods."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds = 0.0

    def watch(self, owner: type, name: str) -> None:
        """Have the method counted from now on."""
        method = getattr(owner, name)

        def counted(*arguments: object) -> object:
            started_s = self._clock()
            try:
                return method(*arguments)
            finally:
                self.seconds += self._clock() - started_s

        setattr(owner, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="skewed")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokenizer", type=Path, default=Path(".cache/demo-model"), help="a model directory")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--device", default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    arguments = parser.parse_args()

    import torch

    from batchinfer.detokenise import Detokenizer
    from batchinfer.engine import kv_cache
    from batchinfer.engine.build import continuous_limits, device_ops
    from batchinfer.engine.continuous import ContinuousEngine
    from batchinfer.engine.decoder import Decoder
    from batchinfer.engine.decoder_config import decoder_config
    from batchinfer.engine.decoder_weights import random_weights
    from batchinfer.engine.engine import Sequence
    from batchinfer.engine.grammar import Grammars, RowGrammar
    from batchinfer.engine.graphs import GraphedDecoder, cuda_recorder
    from batchinfer.engine.token_masks import TokenMasks
    from batchinfer.models.tokenizer import load_tokenizer
    from batchinfer.records import Prompt, SamplingParams
    from batchinfer.spec import canonical_schema

    torch.set_num_threads(arguments.threads)
    config, place = decoder_config(llama_config(arguments.shape)), torch.device(arguments.device)  # type: ignore[arg-type]
    rows: list[BenchRow] = WORKLOADS[arguments.workload](arguments.rows, config.vocab_size)
    max_tokens = max(len(row.prompt) + row.max_new_tokens for row in rows)
    weights = random_weights(config, dtype=torch.bfloat16, device=place)
    decoder = Decoder(config, weights, device_ops(place, torch.bfloat16), max_tokens)
    limits = continuous_limits(config, torch.bfloat16, place, max_tokens)
    kv = kv_cache.allocate(config, limits.num_places + 1, torch.bfloat16, place)
    on_gpu = place.type == "cuda"
    engine = ContinuousEngine(
        GraphedDecoder(decoder, kv, limits.max_rows, cuda_recorder(place)) if on_gpu else decoder,
        kv,
        limits,
        eos_token_ids=(),
        max_model_len=max_tokens,
        grammars=Grammars(Detokenizer(load_tokenizer(arguments.tokenizer)).to_json, (), for_gpu=on_gpu),
    )
    plain = SamplingParams()
    held = SamplingParams(json_schema=canonical_schema(SCHEMA))
    sides = {"plain": (plain,), "schema": (held,), "mixed": (plain, held)}
    stopwatch = Stopwatch(CLOCKS[arguments.clock])
    for owner, name in ((Grammars, "masks"), (TokenMasks, "applied"), (RowGrammar, "ends")):
        stopwatch.watch(owner, name)

    def seconds_of(name: str) -> float:
        chosen = sides[name]
        sequences = [
            Sequence(
                Prompt(
                    f"{name}:{index}",
                    row.prompt,
                    replace(chosen[index % len(chosen)], max_new_tokens=row.max_new_tokens),
                )
            )
            for index, row in enumerate(rows)
        ]
        started_s = CLOCKS[arguments.clock]()
        engine.submit(sequences)
        for row in engine._rows.values():
            row.matcher = HiddenEnd(rows[int(row.sequence.prompt.row_id.split(":")[1])].num_new_tokens)  # type: ignore[assignment]
        num_tokens = 0
        while engine.num_unfinished:
            ends = engine.step()
            assert not [end.error for end in ends if end.error is not None]
            num_tokens += sum(len(end.token_ids) for end in ends)
        seconds = CLOCKS[arguments.clock]() - started_s
        assert num_tokens == sum(row.num_new_tokens for row in rows), num_tokens
        return seconds

    num_in, num_out = sum(len(row.prompt) for row in rows), sum(row.num_new_tokens for row in rows)
    print(
        f"{arguments.workload}: {len(rows)} rows, {num_in:,} tokens in, {num_out:,} out; {arguments.shape}, bfloat16, "
        f"random weights; {arguments.device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}",
        flush=True,
    )
    taken: dict[str, list[float]] = {name: [] for name in arguments.sides}
    for number in range(arguments.rounds + 1):
        for name in arguments.sides:
            began_s, before_s = time.perf_counter(), stopwatch.seconds
            seconds = seconds_of(name)
            if number:
                taken[name].append(seconds)
            wall_s, share = time.perf_counter() - began_s, (stopwatch.seconds - before_s) / seconds
            print(
                f"round {number} {name:<8}{seconds:>8.2f} s, {share:.1%} in masks ({wall_s:.1f} s by the wall)",
                flush=True,
            )
    least = {name: min(seconds) for name, seconds in taken.items()}
    first = least[arguments.sides[0]]
    for name, seconds in least.items():
        rate, ratio = num_out / seconds, seconds / first
        print(f"{name:<8}{seconds:>8.2f} s{rate:>10,.0f} tok/s out{ratio:>8.3f} of {arguments.sides[0]}")
    print(f"the fastest of {arguments.rounds} rounds in {arguments.clock} time")


if __name__ == "__main__":
    main()
