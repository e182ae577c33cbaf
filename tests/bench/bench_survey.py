"""``plan --full``: rows tokenised per second, and memory. ``python tests/bench/bench_survey.py [ROWS] [WORKERS]``.

The rows are those of jobs/prompts, each with a number before it; the tokenizer is the demo model's (``make demo``).
Prints a table. CPU seconds are those of all processes, so that rows per CPU second hold on a busy machine too.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cluster.prepare import prepare
from batchinfer.job_file import parse_job
from batchinfer.survey.plan_survey import worker_setup
from batchinfer.survey.prompts import survey_prompts

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 4


def main(num_rows: int, num_workers: int) -> None:
    texts = [chat[-1]["content"] for chat in pq.read_table(ROOT / "jobs/prompts").column("messages").to_pylist()]
    with tempfile.TemporaryDirectory(prefix="bench-survey-") as directory:
        per_shard = -(-num_rows // NUM_SHARDS)
        for index in range(NUM_SHARDS):
            numbers = range(index * per_shard, min(num_rows, (index + 1) * per_shard))
            table = pa.table({"text": [f"{number} {texts[number % len(texts)]}" for number in numbers]})
            pq.write_table(table, Path(directory) / f"part-{index}.parquet", row_group_size=10_000)
        values: dict[str, object] = {
            "model": {"path": str(ROOT / ".cache/demo-model")},
            "input": {"path": directory},
            "prompt": {"text": "text", "chat": True},
            "output": {"path": f"{directory}-out"},
        }
        preparation = prepare(parse_job(values))
        before_s = _cpu_s()
        started_s = time.perf_counter()
        survey = survey_prompts(
            worker_setup(preparation),
            preparation.plan.shards,
            preparation.pending,
            num_rows=None,
            num_workers=num_workers,
        )
        elapsed_s, cpu_s = time.perf_counter() - started_s, _cpu_s() - before_s
    peak_mb = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    columns = {
        "rows": f"{survey.num_rows_seen:,}",
        "tokens": f"{survey.num_tokens:,}",
        "workers": f"{num_workers}",
        "s": f"{elapsed_s:.1f}",
        "CPU s": f"{cpu_s:.1f}",
        "rows/CPU s": f"{survey.num_rows_seen / cpu_s:,.0f}",
        "tokens/CPU s": f"{survey.num_tokens / cpu_s:,.0f}",
        "main MB": f"{peak_mb[0]:.0f}",
        "worker MB": f"{peak_mb[1]:.0f}",
    }
    print("  ".join(f"{name:>12}" for name in columns))
    print("  ".join(f"{value:>12}" for value in columns.values()))


def _cpu_s() -> float:
    """Of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(arguments[0] if arguments else 100_000, arguments[1] if len(arguments) > 1 else 2)
