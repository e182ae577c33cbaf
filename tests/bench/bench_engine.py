"""Engines side by side on one workload: continuous, padded, transformers ``generate``, and vLLM where it is installed.

    python tests/bench/bench_engine.py [--workload skewed] [--rows 128] [--shape smollm2-135m] [--engines ...]

Each engine runs in a process of its own, one after the other, ``--rounds`` times over, so that none inherits the
other's memory and a drifting machine meets all of them. Weights are random in the shape's exact sizes. Useful
tokens are those up to each row's hidden end; ``generate`` runs batches of 32 in file order to their longest row.
Needs torch, transformers and (on a GPU) triton; the rest is the standard library.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from workloads import WORKLOADS, BenchRow

GENERATE_BATCH = 32

#: LlamaConfig values: EXAONE 3.x is Llama under other names.
SHAPES: dict[str, dict[str, object]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "exaone35-2.4b": {
        "vocab_size": 102400,
        "hidden_size": 2560,
        "intermediate_size": 7168,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 80,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "exaone3-7.8b": {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
}


class HiddenEnd:
    """Ends a row at its hidden length; stands where a stop string's matcher would."""

    def __init__(self, num_tokens: int) -> None:
        self._num_left = num_tokens

    def feed(self, token_id: int) -> bool:
        self._num_left -= 1
        return self._num_left <= 0


def llama_config(shape: str) -> "object":
    from transformers import LlamaConfig

    values = dict(SHAPES[shape])
    theta = values.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig(**values, rms_norm_eps=1e-5, rope_parameters=rope, bos_token_id=1, eos_token_id=2)  # type: ignore[arg-type]


def run_continuous(shape: str, rows: list[BenchRow], device: str) -> float:
    import torch

    from batchinfer.engine import kv_cache
    from batchinfer.engine.build import continuous_limits, device_ops
    from batchinfer.engine.continuous import ContinuousEngine
    from batchinfer.engine.decoder import Decoder
    from batchinfer.engine.decoder_config import decoder_config
    from batchinfer.engine.decoder_weights import random_weights

    config, place = decoder_config(llama_config(shape)), torch.device(device)  # type: ignore[arg-type]
    weights = random_weights(config, dtype=torch.bfloat16, device=place)
    limit = max(len(row.prompt) + row.max_new_tokens for row in rows)
    decoder = Decoder(config, weights, device_ops(place), limit)
    limits = continuous_limits(config, torch.bfloat16, place, limit)
    cache = kv_cache.allocate(config, limits.num_places, torch.bfloat16, place)
    engine = ContinuousEngine(decoder, cache, limits, eos_token_ids=(), max_model_len=limit)
    return drive(engine, rows)


def run_padded(shape: str, rows: list[BenchRow], device: str) -> float:
    from batchinfer.engine.padded import PaddedEngine

    limit = max(len(row.prompt) + row.max_new_tokens for row in rows)
    engine = PaddedEngine(random_model(shape, device), eos_token_ids=(), pad_token_id=0, max_model_len=limit)  # type: ignore[arg-type]
    return drive(engine, rows)


def drive(engine: object, rows: list[BenchRow]) -> float:
    """Submit all rows with their hidden ends and step until none is left; the first few run once to warm up."""
    from batchinfer.engine.engine import Sequence
    from batchinfer.records import Prompt, SamplingParams

    def sequences(chosen: list[BenchRow], name: str) -> list[Sequence]:
        return [
            Sequence(
                Prompt(
                    f"{name}:{index}", row.prompt, SamplingParams(max_new_tokens=row.max_new_tokens, ignore_eos=True)
                )
            )
            for index, row in enumerate(chosen)
        ]

    def run(chosen: list[BenchRow], name: str) -> int:
        engine.submit(sequences(chosen, name))  # type: ignore[attr-defined]
        waiting = engine._rows.values() if isinstance(engine._rows, dict) else engine._waiting  # type: ignore[attr-defined]
        for row in waiting:
            row.matcher = HiddenEnd(chosen[int(row.sequence.prompt.row_id.split(":")[1])].num_new_tokens)
        num_tokens = 0
        while engine.num_unfinished:  # type: ignore[attr-defined]
            num_tokens += sum(len(end.token_ids) for end in engine.step())  # type: ignore[attr-defined]
        return num_tokens

    few = [BenchRow(row.prompt, row.max_new_tokens, min(3, row.num_new_tokens)) for row in rows[:4]]
    run(few, "warm")
    started_s = time.perf_counter()
    num_tokens = run(rows, "row")
    seconds = time.perf_counter() - started_s
    assert num_tokens == sum(row.num_new_tokens for row in rows)
    return seconds


def random_model(shape: str, device: str) -> "object":
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")  # type: ignore[arg-type]
    return model.eval()


def run_generate(shape: str, rows: list[BenchRow], device: str) -> float:
    import torch

    model = random_model(shape, device)
    started_s = time.perf_counter()
    for first in range(0, len(rows), GENERATE_BATCH):
        batch = rows[first : first + GENERATE_BATCH]
        width = max(len(row.prompt) for row in batch)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + list(row.prompt) for row in batch], device=device)
        mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in batch], device=device)
        num_new = max(row.num_new_tokens for row in batch)
        with torch.inference_mode():
            model.generate(  # type: ignore[attr-defined]
                ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def run_vllm(shape: str, rows: list[BenchRow], device: str) -> float:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        llama_config(shape).save_pretrained(folder)  # type: ignore[attr-defined]
        limit = max(len(row.prompt) + row.num_new_tokens for row in rows)
        llm = LLM(folder, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", max_model_len=limit)
        prompts = [{"prompt_token_ids": list(row.prompt)} for row in rows]
        # vLLM has no hidden ends: it is told the true lengths, which is an advantage.
        params = [SamplingParams(temperature=0.0, max_tokens=row.num_new_tokens, ignore_eos=True) for row in rows]
        started_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started_s


ENGINES: dict[str, Callable[[str, list[BenchRow], str], float]] = {
    "continuous": run_continuous,
    "padded": run_padded,
    "generate": run_generate,
    "vllm": run_vllm,
}


def child(arguments: argparse.Namespace) -> None:
    """One engine, one round; prints the seconds as JSON on the last line."""
    import torch
    import transformers

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = WORKLOADS[arguments.workload](arguments.rows, int(str(SHAPES[arguments.shape]["vocab_size"])))
    seconds = ENGINES[arguments.child](arguments.shape, rows, arguments.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"seconds": seconds, "versions": versions}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="skewed")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["continuous", "padded", "generate"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    parser.add_argument("--device", default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    rows = WORKLOADS[arguments.workload](arguments.rows, int(str(SHAPES[arguments.shape]["vocab_size"])))
    num_in, num_out = sum(len(row.prompt) for row in rows), sum(row.num_new_tokens for row in rows)
    engines = [name for name in arguments.engines if name != "vllm" or importlib.util.find_spec("vllm")]
    print(
        f"{arguments.workload}: {len(rows)} rows, {num_in:,} tokens in, {num_out:,} out; {arguments.shape}, bfloat16, "
        f"random weights; {arguments.device}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    versions = ""
    for _ in range(arguments.rounds):
        for name in engines:
            ended = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", name],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            outcome = json.loads(ended.stdout.splitlines()[-1])
            seconds[name].append(outcome["seconds"])
            versions = outcome["versions"]
    print(versions)
    print(f"{'engine':<12}{'seconds':>10}{'out tok/s':>12}{'all tok/s':>12}{'ratio':>8}   (to the last engine, median)")
    medians = {name: sorted(runs)[len(runs) // 2] for name, runs in seconds.items()}
    last = medians[engines[-1]]
    for name, median in medians.items():
        rates = f"{num_out / median:>12,.0f}{(num_in + num_out) / median:>12,.0f}"
        print(f"{name:<12}{median:>10.1f}{rates}{last / median:>8.2f}")


if __name__ == "__main__":
    main()
