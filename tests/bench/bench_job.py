"""A whole job against the bare engine on the same rows and model: what Parquet, Ray and the driver cost.

    python tests/bench/bench_job.py [--rows 128] [--new-tokens 64] [--dtype bfloat16] [--threads 2] [--rounds 2]

Bare: the engine is built in this process, all rows are submitted at once, and the clock runs from the first step to
the last. Job: ``batchinfer run`` in a process of its own, with the Ray it starts, from Parquet to Parquet; the clock
runs from the replica's readiness to the last commit (``generation_s``). Prompts are the demo's, repeated; every row
generates the same number of tokens. The two alternate, and each round gives one ratio: on a shared machine a pair
taken back to back says more than two means. Where others take turns at the cores all the time, the ratio of the CPU
seconds that the engine's own process took (in the job: the replica's, row work included) is the steadier figure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
import yaml

from batchinfer.cluster.engine_loading import LoadedEngine, load_engine
from batchinfer.cluster.messages import ReplicaSetup
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Sequence
from batchinfer.job_file import load_job
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
        "engine": {"kind": options.engine, "max_batch_rows": options.batch_rows},
        "cluster": {"replicas": 1, "num_cpus": options.threads},
        "execution": {"rows_per_unit": options.rows_per_unit},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def load(job_file: Path, rows: pa.Table) -> tuple[LoadedEngine, list[Prompt]]:
    """The job's engine and prompts, made as a replica makes them."""
    spec = load_job(str(job_file), [])
    directory = Path(spec.model.path)
    tokenizer = load_tokenizer(directory)
    setup = ReplicaSetup(
        spec=spec,
        model_revision=None,
        fingerprint="",
        run_id="bench",
        schema=rows.schema,
        output_columns=(),
        num_gpus=0.0,
        num_cpus=spec.cluster.num_cpus or 1.0,
        fault_seed="",
    )
    loaded = load_engine(setup, directory, Detokenizer(tokenizer))
    renderer = PromptRenderer(
        spec.prompt, spec.sampling, tokenizer, max_model_len=loaded.max_model_len, vocab_size=loaded.vocab_size
    )
    rendered = renderer.render(rows, [f"bench:{number}" for number in range(rows.num_rows)])
    prompts = [item for item in rendered if isinstance(item, Prompt)]
    assert len(prompts) == rows.num_rows
    return loaded, prompts


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: what it generated, how long that took, and the CPU time of the process with the engine."""

    num_tokens: int
    elapsed_s: float
    cpu_s: float


def run_bare(job_file: Path, rows: pa.Table) -> Measured:
    loaded, prompts = load(job_file, rows)
    engine = loaded.engine
    engine.submit(Sequence(prompt) for prompt in prompts)
    num_tokens, started_s, started_cpu_s = 0, time.perf_counter(), time.process_time()
    while engine.num_unfinished:
        num_tokens += sum(len(generation.token_ids) for generation in engine.step())
    measured = Measured(num_tokens, time.perf_counter() - started_s, time.process_time() - started_cpu_s)
    engine.close()
    return measured


def run_job(job_file: Path, output: Path) -> Measured:
    command = [sys.executable, "-m", "batchinfer", "run", str(job_file), "--json", "--set", f"output.path={output}"]
    printed, logged = output.with_suffix(".json"), output.with_suffix(".log")
    # Ray runs its workers at nice 15. On a machine that others use too, that would be all this measures.
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with printed.open("wb") as stdout, logged.open("wb") as stderr:
        run = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        ready_cpu_s, cpu_s = None, 0.0
        while run.poll() is None:
            cpu_s = replica_cpu_s(run.pid) or cpu_s
            if ready_cpu_s is None and b"is ready on" in logged.read_bytes():
                ready_cpu_s = cpu_s
            time.sleep(0.1)
    if run.returncode or ready_cpu_s is None:
        sys.exit(f"batchinfer run ended with {run.returncode}:\n{logged.read_text()}")
    result = json.loads(printed.read_text())
    return Measured(result["num_completion_tokens"], result["generation_s"], cpu_s - ready_cpu_s)


def replica_cpu_s(driver_id: int) -> float | None:
    """CPU time so far of the replica below this driver; None before and after its life."""
    try:
        for child in psutil.Process(driver_id).children(recursive=True):
            if "ray::Replica" in " ".join(child.cmdline()):
                times = child.cpu_times()
                return float(times.user + times.system)
    except psutil.Error:
        return None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows-per-unit", type=int, default=32)
    parser.add_argument("--engine", default="auto", help="engine.kind of both")
    parser.add_argument("--batch-rows", type=int, default=None, help="engine.max_batch_rows of both")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "demo-model")
    options = parser.parse_args()
    if not options.model.exists():
        subprocess.run([sys.executable, "-m", "batchinfer.models.demo", str(options.model)], check=True)
    # What Ray sets for an actor with this many cores.
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-job-") as directory:
        folder = Path(directory)
        rows = write_rows(folder / "in", options.rows)
        job_file = write_job(folder, options)
        print(
            f"{options.model.name}, {options.engine} engine, {options.dtype}, {options.threads} threads of "
            f"{os.cpu_count()} cores, {options.rows} rows, {options.new_tokens} new tokens a row, "
            f"{options.rows_per_unit} rows a unit"
        )
        run_bare(job_file, rows.slice(0, 2))  # the first passes of a process are slower
        names = ("round", "bare s", "job s", "bare tok/s", "job tok/s", "ratio", "bare cpu s", "job cpu s", "cpu ratio")
        print(" ".join(f"{name:>10}" for name in names))
        ratios: list[float] = []
        for number in range(1, options.rounds + 1):
            bare = run_bare(job_file, rows)
            job = run_job(job_file, folder / f"out-{number}")
            assert bare.num_tokens == job.num_tokens == options.rows * options.new_tokens
            ratios.append(bare.elapsed_s / job.elapsed_s)
            tokens_per_s = bare.num_tokens / bare.elapsed_s
            print(
                f"{number:>10} {bare.elapsed_s:>10.1f} {job.elapsed_s:>10.1f} {tokens_per_s:>10.1f} "
                f"{job.num_tokens / job.elapsed_s:>10.1f} {ratios[-1]:>10.3f} {bare.cpu_s:>10.1f} {job.cpu_s:>10.1f} "
                f"{bare.cpu_s / job.cpu_s:>10.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
