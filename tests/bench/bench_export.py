"""How fast a large output is exported, and in how much memory: rows per second and the peak, form by form.

    python tests/bench/bench_export.py [--rows 1000000] [--forms parquet jsonl openai-batch mt-bench]

Writes an output of chats (some 700 bytes a row) below a temporary directory, then exports it in each form, each in a
process of its own.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.export import FORMATS, export
from batchinfer.planner import plan_input
from batchinfer.records import Completion
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import write_job, write_plan
from batchinfer.storage.writer import PartFormat, publish_unit

SENTENCE = "The tide table on the harbour wall is older than any of the boats that are tied up below it. "
COLUMNS = ("custom_id", "method", "url", "body", "question_id")


def write_output(root: Path, num_rows: int) -> None:
    """Shards of 100,000 requests, every unit committed."""
    (root / "in").mkdir()
    for first in range(0, num_rows, 100_000):
        numbers = range(first, min(first + 100_000, num_rows))
        bodies = [
            json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{number} {SENTENCE * 2}"}]})
            for number in numbers
        ]
        table = pa.table(
            {
                "custom_id": [f"request-{number}" for number in numbers],
                "method": ["POST"] * len(numbers),
                "url": ["/v1/chat/completions"] * len(numbers),
                "body": bodies,
                "question_id": list(numbers),
            }
        )
        pq.write_table(table, root / "in" / f"part-{first:09d}.parquet")
    plan = plan_input([str(root / "in")], None, 1024).plan
    output = locate(str(root / "out"))
    write_plan(output, plan)
    write_job(output, {"name": "bench", "fingerprint": "f" * 16, "n": 1, "spec": {"prompt": {"request": "body"}}})
    part = PartFormat("f" * 16, "run-1", COLUMNS)
    for shard in plan.shards:
        rows = pq.read_table(shard.uri)
        for unit in shard.units:
            completions = [
                Completion(unit.row_id(offset), 0, f"{offset} {SENTENCE * 4}", range(80), "stop", 60)
                for offset in range(unit.num_rows)
            ]
            publish_unit(output, unit, rows.slice(unit.first_row, unit.num_rows), completions, [], part)


def measure(root: Path, form: str) -> None:
    """One export, told as JSON."""
    began = time.perf_counter()
    result = export(str(root / "out"), str(root / "copy"), form, ordered=True)  # type: ignore[arg-type]
    wall_s = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    size_bytes = sum(path.stat().st_size for path in (root / "copy").rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                "form": form,
                "rows": result.num_completions,
                "wall_s": round(wall_s, 1),
                "cpu_s": round(used.ru_utime + used.ru_stime, 1),
                "rows_per_s": round(result.num_completions / wall_s),
                "peak_mib": used.ru_maxrss // 1024,
                "written_mib": size_bytes >> 20,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--forms", nargs="+", choices=FORMATS, default=["parquet", "jsonl", "openai-batch", "mt-bench"])
    parser.add_argument("--measure", nargs=2, metavar=("ROOT", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1])
        return
    with tempfile.TemporaryDirectory(prefix="bench-export-") as directory:
        root = Path(directory)
        write_output(root, arguments.rows)
        for form in arguments.forms:
            subprocess.run([sys.executable, __file__, "--measure", directory, form], check=True)
            shutil.rmtree(root / "copy")


if __name__ == "__main__":
    main()
