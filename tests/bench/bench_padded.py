"""The padded engine against transformers' own ``generate`` in batches of 32 in file order, on CPU.

    python tests/bench/bench_padded.py [--rows 128] [--threads 2] [--model DIR] [--rounds 1]

Rows have lognormal lengths (median 40 in and 40 out, sigma 1, at most 256). A row's output length is known to
the row alone, as a stop token would be: the engine drops a row when it ends, ``generate`` runs each batch to its
longest row. Useful tokens are those that rows asked for. Both run in this process, one after the other.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from batchinfer.engine.engine import Sequence
from batchinfer.engine.padded import PaddedEngine
from batchinfer.records import Prompt, SamplingParams

MEDIAN = 40
SIGMA = 1.0
LONGEST = 256
GENERATE_BATCH = 32


@dataclass(frozen=True, slots=True)
class Row:
    prompt: tuple[int, ...]
    num_new_tokens: int


def skewed_rows(num: int, vocab_size: int, seed: int) -> list[Row]:
    rng = random.Random(seed)

    def length() -> int:
        return max(1, min(LONGEST, round(rng.lognormvariate(0.0, SIGMA) * MEDIAN)))

    return [Row(tuple(rng.randrange(10, vocab_size) for _ in range(length())), length()) for _ in range(num)]


def smollm2_shape(dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Random weights in SmolLM2-135M's shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def run_generate(model: PreTrainedModel, rows: SequenceOf[Row]) -> None:
    """Batches in file order, left-padded, each to its longest row."""
    for start in range(0, len(rows), GENERATE_BATCH):
        batch = rows[start : start + GENERATE_BATCH]
        width = max(len(row.prompt) for row in batch)
        num_new = max(row.num_new_tokens for row in batch)
        tokens = torch.tensor([[0] * (width - len(row.prompt)) + list(row.prompt) for row in batch])
        mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in batch])
        output = model.generate(
            tokens, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0
        )
        assert output.shape[1] == width + num_new


def run_padded(model: PreTrainedModel, rows: SequenceOf[Row], max_batch_rows: int | None) -> None:
    engine = PaddedEngine(model, eos_token_ids=(), pad_token_id=0, max_model_len=2048, max_batch_rows=max_batch_rows)
    engine.submit(
        Sequence(Prompt(f"bench:{i}", row.prompt, SamplingParams(max_new_tokens=row.num_new_tokens, ignore_eos=True)))
        for i, row in enumerate(rows)
    )
    lengths: dict[str, int] = {}
    while engine.num_unfinished:
        lengths |= {end.sequence.prompt.row_id: len(end.token_ids) for end in engine.step()}
    assert lengths == {f"bench:{i}": row.num_new_tokens for i, row in enumerate(rows)}
    stats = engine.stats()
    print(f"    padded: {stats.num_steps} steps, {stats.num_padding_tokens} padding tokens in prefill", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-rows", type=int, default=None, help="the padded engine's max_batch_rows")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", default=None, help="model directory; default: random weights, SmolLM2-135M's shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("padded", "generate"), default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model = smollm2_shape(dtype, options.seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    rows = skewed_rows(options.rows, model.config.vocab_size, options.seed)
    num_prompt = sum(len(row.prompt) for row in rows)
    num_useful = sum(row.num_new_tokens for row in rows)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, "
        f"{options.dtype}, seed {options.seed}\nmodel {options.model or 'random weights, SmolLM2-135M shape'}; "
        f"{len(rows)} rows, {num_prompt} prompt tokens, {num_useful} useful new tokens",
        flush=True,
    )
    contenders: dict[str, Callable[[], None]] = {
        "padded": lambda: run_padded(model, rows, options.batch_rows),
        "generate": lambda: run_generate(model, rows),
    }
    warm_up = rows[:2]
    run_padded(model, [Row(row.prompt, 2) for row in warm_up], None)
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            if options.only in (None, name):
                gc.collect()
                start_s = time.perf_counter()
                run()
                elapsed_s = time.perf_counter() - start_s
                best[name] = min(elapsed_s, best.get(name, elapsed_s))
                print(f"    {name}: {elapsed_s:.1f} s", flush=True)
    print(f"\n{'engine':<28}{'seconds':>9}{'useful tok/s':>14}")
    for name, elapsed_s in best.items():
        print(f"{name:<28}{elapsed_s:>9.1f}{num_useful / elapsed_s:>14.1f}")
    if len(best) == 2:
        print(f"ratio padded / generate: {best['generate'] / best['padded']:.2f}")


if __name__ == "__main__":
    main()
