"""How often another batch shape changes a token, in float32 on CPU.

    python tests/bench/bench_flips.py [--tiny-rows 2000] [--demo-rows 24] [--seed 0]

Matrix products add in another order when the batch has another shape, so logits differ in their last bits, and where
two candidates tie to about 1e-6 (or a draw falls that near a border) another token wins. The same sequences are
generated with three values of ``max_batch_rows``, and the second and third are compared with the first; what follows
a row's first divergence is another text and is not compared. The rate is flips per 100,000 tokens compared.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from batchinfer.engine.engine import Sequence
from batchinfer.engine.padded import PaddedEngine
from batchinfer.models.loading import load_model
from batchinfer.records import Prompt, SamplingParams

REPOSITORY = Path(__file__).parents[2]

GREEDY = SamplingParams(ignore_eos=True)
SAMPLED = SamplingParams(ignore_eos=True, temperature=0.8, top_p=0.95, seed=11)


@dataclass(frozen=True, slots=True)
class Case:
    """One model with the rows it is asked for."""

    name: str
    model: PreTrainedModel
    num_rows: int
    num_new_tokens: int
    #: The first is what the others are compared with.
    batch_rows: tuple[int, ...]


def tiny_llama() -> PreTrainedModel:
    """Random weights; large ones, so that greedy texts do not fall into loops at once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def rows(num: int, vocab_size: int, sampling: SamplingParams, seed: int) -> list[Sequence]:
    """Random prompts of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 41, (num,), generator=generator).tolist()
    return [
        Sequence(
            Prompt(
                f"flips:{k}", tuple(torch.randint(10, vocab_size, (length,), generator=generator).tolist()), sampling
            )
        )
        for k, length in enumerate(lengths)
    ]


def generate(
    model: PreTrainedModel, sequences: SequenceOf[Sequence], max_batch_rows: int
) -> dict[str, tuple[int, ...]]:
    """Token ids by row id."""
    engine = PaddedEngine(model, eos_token_ids=(), pad_token_id=0, max_model_len=512, max_batch_rows=max_batch_rows)
    engine.submit(sequences)
    found: dict[str, tuple[int, ...]] = {}
    while engine.num_unfinished:
        found |= {end.sequence.prompt.row_id: end.token_ids for end in engine.step()}
    engine.close()
    assert len(found) == len(sequences)
    return found


def first_divergences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """(rows that diverge, tokens compared: up to and with a row's first divergence)."""
    num_flips = num_compared = 0
    for row_id, tokens in expected.items():
        differing = [k for k, pair in enumerate(zip(tokens, found[row_id], strict=True)) if pair[0] != pair[1]]
        num_flips += bool(differing)
        num_compared += differing[0] + 1 if differing else len(tokens)
    return num_flips, num_compared


def measure(case: Case, seed: int) -> None:
    vocab_size = case.model.config.vocab_size
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        sequences = rows(case.num_rows, vocab_size, replace(sampling, max_new_tokens=case.num_new_tokens), seed)
        reference, *others = case.batch_rows
        expected = generate(case.model, sequences, reference)
        for max_batch_rows in others:
            started_s = time.perf_counter()
            num_flips, num_compared = first_divergences(expected, generate(case.model, sequences, max_batch_rows))
            print(
                f"{case.name:<14} {name:<8} {f'{reference} / {max_batch_rows}':>10} {num_compared:>9,} {num_flips:>6} "
                f"{num_flips / num_compared * 1e5:>12.2f} {time.perf_counter() - started_s:>8.1f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny-rows", type=int, default=2000)
    parser.add_argument("--demo-rows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "demo-model")
    options = parser.parse_args()
    if not options.model.exists():
        subprocess.run([sys.executable, "-m", "batchinfer.models.demo", str(options.model)], check=True)
    demo = load_model(options.model, dtype="float32", device="cpu").model
    # On a machine that others use too, threads would mostly wait for each other.
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, 1 thread, seed {options.seed}")
    print(f"{'model':<14} {'sampling':<8} {'batch rows':>10} {'tokens':>9} {'flips':>6} {'per 100,000':>12} {'s':>8}")
    measure(Case("tiny random", tiny_llama(), options.tiny_rows, 64, (32, 7, 128)), options.seed)
    measure(Case(options.model.name, demo, options.demo_rows, 32, (8, 3, 24)), options.seed)


if __name__ == "__main__":
    main()
