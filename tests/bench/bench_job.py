"""A whole job against the bare engine on the same rows and model: what Parquet, Ray and the driver cost.

    python tests/bench/bench_job.py [--rows 128] [--new-tokens 64] [--dtype bfloat16] [--threads 2] [--rounds 2]

Bare: the engine is built in this process, all rows are submitted at once, and the clock runs from the first step to
the last. Job: ``batchinfer run`` in a process of its own, with the Ray it starts, from Parquet to Parquet; the clock
runs from the replica's readiness to the last commit (``generation_s``). Prompts are the demo's, repeated; every row
generates the same number of tokens. The two alternate, and each round gives one ratio: on a shared machine a pair
taken back to back says more than two means.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
import yaml

from batchinfer.engine.build import build_engine
from batchinfer.engine.engine import Sequence
from batchinfer.job_file import load_job
from batchinfer.models.loading import LoadedModel, load_model
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Prompt

REPOSITORY = Path(__file__).parents[2]


def write_rows(directory: Path, num_rows: int) -> pa.Table:
    """The demo's chats, repeated to ``num_rows``, as one shard; returns its rows."""
    chats = ds.dataset(REPOSITORY / "jobs" / "prompts").to_table(columns=["id", "messages"])
    rows = chats.take([number % chats.num_rows for number in range(num_rows)])
    directory.mkdir()
    pq.write_table(rows, directory / "rows.parquet")
    return rows


def write_job(folder: Path, options: argparse.Namespace) -> Path:
    """The job both sides are configured from."""
    job = {
        "model": {"path": str(options.model), "dtype": options.dtype, "device": "cpu"},
        "input": {"path": str(folder / "in")},
        "prompt": {"messages": "messages"},
        "sampling": {"max_new_tokens": options.new_tokens, "ignore_eos": True},
        "output": {"path": str(folder / "out")},
        "engine": {"kind": "padded", "max_batch_rows": options.batch_rows},
        "cluster": {"replicas": 1, "num_cpus": options.threads},
        "execution": {"rows_per_unit": options.rows_per_unit},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def render(job_file: Path, loaded: LoadedModel, rows: pa.Table) -> list[Prompt]:
    """The prompts as a replica renders them."""
    spec = load_job(str(job_file), [])
    renderer = PromptRenderer(
        spec.prompt,
        spec.sampling,
        load_tokenizer(Path(spec.model.path)),
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.vocab_size,
    )
    rendered = renderer.render(rows, [f"bench:{number}" for number in range(rows.num_rows)])
    prompts = [item for item in rendered if isinstance(item, Prompt)]
    assert len(prompts) == rows.num_rows
    return prompts


def run_bare(loaded: LoadedModel, prompts: list[Prompt], max_batch_rows: int | None) -> tuple[int, float]:
    """(completion tokens, seconds)."""
    engine = build_engine("padded", loaded, max_batch_rows=max_batch_rows)
    engine.submit(Sequence(prompt) for prompt in prompts)
    num_tokens, started_s = 0, time.perf_counter()
    while engine.num_unfinished:
        num_tokens += sum(len(generation.token_ids) for generation in engine.step())
    elapsed_s = time.perf_counter() - started_s
    engine.close()
    return num_tokens, elapsed_s


def run_job(job_file: Path, output: Path) -> tuple[int, float]:
    """(completion tokens, seconds)."""
    command = [sys.executable, "-m", "batchinfer", "run", str(job_file), "--json", "--set", f"output.path={output}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"batchinfer run ended with {ended.returncode}:\n{ended.stderr}")
    result = json.loads(ended.stdout)
    return result["num_completion_tokens"], result["generation_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows-per-unit", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=None, help="engine.max_batch_rows of both")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "demo-model")
    options = parser.parse_args()
    if not options.model.exists():
        subprocess.run([sys.executable, "-m", "batchinfer.models.demo", str(options.model)], check=True)
    # What Ray sets for an actor with this many cores.
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype=options.dtype, device="cpu")
    with tempfile.TemporaryDirectory(prefix="bench-job-") as directory:
        folder = Path(directory)
        rows = write_rows(folder / "in", options.rows)
        job_file = write_job(folder, options)
        prompts = render(job_file, loaded, rows)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        print(
            f"{options.model.name}, {options.dtype}, {options.threads} threads of {os.cpu_count()} cores, "
            f"{len(prompts)} rows, {num_prompt_tokens} prompt tokens, {options.new_tokens} new tokens a row, "
            f"{options.rows_per_unit} rows a unit"
        )
        run_bare(loaded, prompts[:2], options.batch_rows)  # the first passes are slower
        print(f"{'round':>5} {'bare s':>8} {'bare tok/s':>11} {'job s':>8} {'job tok/s':>11} {'job / bare':>11}")
        ratios: list[float] = []
        for number in range(1, options.rounds + 1):
            num_bare, bare_s = run_bare(loaded, prompts, options.batch_rows)
            num_job, job_s = run_job(job_file, folder / f"out-{number}")
            assert num_bare == num_job == len(prompts) * options.new_tokens
            ratios.append(bare_s / job_s)
            print(
                f"{number:>5} {bare_s:>8.1f} {num_bare / bare_s:>11.1f} {job_s:>8.1f} {num_job / job_s:>11.1f} "
                f"{ratios[-1]:>11.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
