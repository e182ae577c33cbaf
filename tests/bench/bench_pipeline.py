"""Rows per second and memory of the whole way from Parquet to Parquet, with an engine that costs nothing.

    python tests/bench/bench_pipeline.py [--rows 10000 100000 1000000] [--model DIRECTORY]

One replica reads, tokenises, hands to the fake engine, detokenises and publishes. The rate is taken from the
moment the replica is ready; memory is the peak resident set of the driver and of the replica, each a process of
its own. Flat memory means that the million-row line shows about the numbers of the ten-thousand-row line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SENTENCE = "Explain in two short sentences why the number {} matters to people who count sheep at night."


def write_rows(path: Path, num_rows: int) -> None:
    """One shard with one row group per 100,000 rows."""
    schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, 100_000):
            ids = range(first, min(first + 100_000, num_rows))
            writer.write_table(pa.table({"id": ids, "prompt": [SENTENCE.format(k) for k in ids]}, schema=schema))


def peak_bytes(process: psutil.Process) -> int:
    """Peak resident set of a process so far."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(model: Path, num_rows: int) -> tuple[float, float, int, int]:
    """(rows/s, completion tokens/s, driver's peak bytes, replica's peak bytes) of one run."""
    folder = Path(tempfile.mkdtemp(prefix="bench-pipeline-"))
    try:
        (folder / "in").mkdir()
        write_rows(folder / "in" / "rows.parquet", num_rows)
        job = {
            "model": {"path": str(model)},
            "input": {"path": str(folder / "in")},
            "prompt": {"text": "prompt"},
            "sampling": {"max_new_tokens": 16},
            "output": {"path": str(folder / "out")},
            "engine": {"kind": "fake"},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        command = [sys.executable, "-m", "batchinfer", "run", str(folder / "job.yaml"), "--json"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        driver, peak_driver, peak_replica = psutil.Process(run.pid), 0, 0
        while run.poll() is None:
            try:
                peak_driver = max(peak_driver, peak_bytes(driver))
                for child in driver.children(recursive=True):
                    if "ray::Replica" in " ".join(child.cmdline()):
                        peak_replica = max(peak_replica, peak_bytes(child))
            except (psutil.Error, FileNotFoundError, ProcessLookupError):
                pass  # it ended while we looked
            time.sleep(0.2)
        assert run.stdout is not None
        result = json.loads(run.stdout.read())
        assert result["outcome"] == "complete", result
        seconds = result["generation_s"]
        return num_rows / seconds, result["num_completion_tokens"] / seconds, peak_driver, peak_replica
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", type=Path, default=Path(".cache/demo-model"), help="its tokenizer is what counts")
    arguments = parser.parse_args()
    if not arguments.model.exists():
        subprocess.run([sys.executable, "-m", "batchinfer.models.demo", str(arguments.model)], check=True)
    print(f"cores {os.cpu_count()}, tokenizer of {arguments.model}, one replica, fake engine, up to 16 tokens a row")
    print(f"{'rows':>10} {'rows/s':>10} {'tok/s out':>10} {'driver MB':>10} {'replica MB':>10}")
    for num_rows in arguments.rows:
        rows_per_s, tokens_per_s, driver, replica = measure(arguments.model, num_rows)
        rates = f"{rows_per_s:>10,.0f} {tokens_per_s:>10,.0f}"
        print(f"{num_rows:>10,} {rates} {driver / 1e6:>10,.0f} {replica / 1e6:>10,.0f}", flush=True)


if __name__ == "__main__":
    main()
