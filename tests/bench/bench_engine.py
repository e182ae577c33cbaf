"""Engines side by side on one workload: continuous, padded, transformers ``generate``, and vLLM where it is installed.

    python tests/bench/bench_engine.py [--workload skewed] [--rows 128] [--shape smollm2-135m] [--engines ...]

Each engine runs in a process of its own, one after the other, ``--rounds`` times over, so that none inherits the
other's memory and a drifting machine meets all of them. Weights are random in the shape's exact sizes. Useful
tokens are those up to each row's hidden end; ``generate`` runs batches of 32 in file order to their longest row.
The share of the floor (``floor.py``) is taken at an H100's rates on a GPU, and on a CPU at those that each engine's
own process measures beside it. ``--clock cpu`` counts processor time, for a machine that has other work to do.
Needs torch, transformers and (on a GPU) triton; the rest is the standard library. On a CPU numba makes the continuous
engine faster. vLLM is best met in an environment of its own: run this file with its Python and PYTHONPATH=. there.
What has been measured is in RESULTS.md.
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
from dataclasses import dataclass
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


#: What ``--clock`` means.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine is to be timed with."""

    shape: str
    rows: list[BenchRow]
    device: str
    clock: Callable[[], float]

    @property
    def max_tokens(self) -> int:
        """The longest sequence an engine must be ready for."""
        return max(len(row.prompt) + row.max_new_tokens for row in self.rows)


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


def run_continuous(run: Run) -> float:
    import torch

    from batchinfer.engine import kv_cache
    from batchinfer.engine.build import continuous_limits, device_ops
    from batchinfer.engine.continuous import ContinuousEngine
    from batchinfer.engine.decoder import Decoder
    from batchinfer.engine.decoder_config import decoder_config
    from batchinfer.engine.decoder_weights import random_weights
    from batchinfer.engine.graphs import GraphedDecoder, cuda_recorder

    config, place = decoder_config(llama_config(run.shape)), torch.device(run.device)  # type: ignore[arg-type]
    weights = random_weights(config, dtype=torch.bfloat16, device=place)
    decoder = Decoder(config, weights, device_ops(place, torch.bfloat16), run.max_tokens)
    limits = continuous_limits(config, torch.bfloat16, place, run.max_tokens)
    # As build_engine puts it together.
    kv = kv_cache.allocate(config, limits.num_places + 1, torch.bfloat16, place)
    graphed = GraphedDecoder(decoder, kv, limits.max_rows, cuda_recorder(place)) if run.device == "cuda" else decoder
    return drive(ContinuousEngine(graphed, kv, limits, eos_token_ids=(), max_model_len=run.max_tokens), run)


def run_padded(run: Run) -> float:
    from batchinfer.engine.padded import PaddedEngine

    model = random_model(run.shape, run.device)
    engine = PaddedEngine(model, eos_token_ids=(), pad_token_id=0, max_model_len=run.max_tokens)  # type: ignore[arg-type]
    return drive(engine, run)


def drive(engine: object, timed: Run) -> float:
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

    few = [BenchRow(row.prompt, row.max_new_tokens, min(3, row.num_new_tokens)) for row in timed.rows[:4]]
    run(few, "warm")
    started_s = timed.clock()
    num_tokens = run(timed.rows, "row")
    seconds = timed.clock() - started_s
    assert num_tokens == sum(row.num_new_tokens for row in timed.rows)
    return seconds


def random_model(shape: str, device: str) -> "object":
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")  # type: ignore[arg-type]
    return model.eval()


def run_generate(run: Run) -> float:
    import torch

    model, rows, device = random_model(run.shape, run.device), run.rows, run.device
    started_s = run.clock()
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
    return run.clock() - started_s


def run_vllm(run: Run) -> float:
    """As it comes: layers compiled and, on a GPU, captured as graphs before the clock starts."""
    return time_vllm(run, enforce_eager=False)


def run_vllm_eager(run: Run) -> float:
    return time_vllm(run, enforce_eager=True)


def time_vllm(run: Run, enforce_eager: bool) -> float:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        llama_config(run.shape).save_pretrained(folder)  # type: ignore[attr-defined]
        rows, limit = run.rows, max(len(row.prompt) + row.num_new_tokens for row in run.rows)
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=limit,
            enforce_eager=enforce_eager,
        )
        prompts = [{"prompt_token_ids": list(row.prompt)} for row in rows]
        # vLLM has no hidden ends: it is told the true lengths, which is an advantage.
        params = [SamplingParams(temperature=0.0, max_tokens=row.num_new_tokens, ignore_eos=True) for row in rows]
        llm.generate(prompts[:4], [SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)] * 4, use_tqdm=False)
        # It works in processes of its own, whose processor time is not seen from here.
        started_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started_s


ENGINES: dict[str, Callable[[Run], float]] = {
    "continuous": run_continuous,
    "padded": run_padded,
    "generate": run_generate,
    "vllm": run_vllm,
    "vllm-eager": run_vllm_eager,
}


def child(arguments: argparse.Namespace) -> None:
    """One engine, one round; prints as JSON on a line of its own its seconds and those of the floor."""
    import torch
    import transformers
    from floor import H100, floor_s, measured_rates

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    rows = WORKLOADS[arguments.workload](arguments.rows, int(str(shape["vocab_size"])))
    clock = CLOCKS[arguments.clock]
    rates = H100 if arguments.device == "cuda" else measured_rates(shape, clock)
    seconds = ENGINES[arguments.child](Run(arguments.shape, rows, arguments.device, clock))
    made_with = (
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, transformers {transformers.__version__}; "
        f"{rates.flops_per_s / 1e9:,.0f} GFLOP/s, {rates.bytes_per_s / 1e9:,.0f} GB/s"
    )
    print(json.dumps({"seconds": seconds, "floor_s": floor_s(shape, rows, rates), "made_with": made_with}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="skewed")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["continuous", "padded", "generate"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    rows = WORKLOADS[arguments.workload](arguments.rows, int(str(SHAPES[arguments.shape]["vocab_size"])))
    num_in, num_out = sum(len(row.prompt) for row in rows), sum(row.num_new_tokens for row in rows)
    engines = [name for name in arguments.engines if not name.startswith("vllm") or importlib.util.find_spec("vllm")]
    print(
        f"{arguments.workload}: {len(rows)} rows, {num_in:,} tokens in, {num_out:,} out; {arguments.shape}, bfloat16, "
        f"random weights; {arguments.device}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    floors = []
    for _ in range(arguments.rounds):
        for name in engines:
            ended = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", name],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            # vLLM's processes print when they end, too.
            line = next(line for line in reversed(ended.stdout.splitlines()) if line.startswith('{"seconds"'))
            outcome = json.loads(line)
            seconds[name].append(outcome["seconds"])
            floors.append(outcome["floor_s"])
            print(f"{name:<12}{outcome['seconds']:>10.1f} s   {outcome['made_with']}", flush=True)
    # The machine's best: in a disturbed moment it measures less of itself.
    least_s = min(floors)
    print(f"{'engine':<12}{'seconds':>10}{'out tok/s':>12}{'all tok/s':>12}{'of floor':>10}{'ratio':>8}")
    medians = {name: sorted(runs)[len(runs) // 2] for name, runs in seconds.items()}
    last = medians[engines[-1]]
    for name, median in medians.items():
        rates = f"{num_out / median:>12,.0f}{(num_in + num_out) / median:>12,.0f}"
        print(f"{name:<12}{median:>10.1f}{rates}{least_s / median:>10.2f}{last / median:>8.2f}")
    print(f"floor {least_s:.1f} s; medians in {arguments.clock} time; ratio to the last engine")


if __name__ == "__main__":
    main()
