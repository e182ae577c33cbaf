"""JSON Lines: rows planned and read per second of processor time, and peak memory.

Prints a table; ``python tests/bench/bench_jsonl.py [LINES]``. The ways: ``bulk``, what Arrow's parser takes; ``line by
line``, with a column that is kept as JSON text; ``gzip``, as bulk but compressed.
"""

import gzip
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from batchinfer.planner import columns_to_read, plan_input
from batchinfer.storage.filesystem import locate
from batchinfer.storage.shard_reader import ShardReader

ROWS_PER_UNIT = 1024


def write(path: Path, num_lines: int) -> None:
    """Lines as a job has them: about 330 bytes, a nested value, some Korean."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_lines):
            row = {
                "id": number,
                "prompt": f"{number}번 이야기를 짧게 써 주세요. Write a short story about it, please. " * 3,
                "score": number / 7,
                "meta": {"lang": "ko", "tags": ["a", "b"][: number % 3]},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(way: str, path: Path, as_texts: tuple[str, ...]) -> None:
    """Plan and read one input; prints a line."""
    started_s = time.process_time()
    found = plan_input([str(path)], None, ROWS_PER_UNIT, json_text_columns=as_texts)
    planned_s = time.process_time() - started_s
    shard, units = found.plan.shards[0], found.plan.units
    reader = ShardReader(locate, columns_to_read(found.schemas, (), None)[0])
    started_s = time.process_time()
    num_rows = sum(reader.read_unit(shard.for_unit(unit), unit).table.num_rows for unit in units)
    read_s = time.process_time() - started_s
    assert num_rows == found.plan.num_rows
    columns = {
        "way": way,
        "rows": f"{num_rows:,}",
        "MB": f"{shard.size_bytes / 1e6:.0f}",
        "plan s": f"{planned_s:.2f}",
        "planned rows/s": f"{num_rows / planned_s:,.0f}",
        "read s": f"{read_s:.2f}",
        "read rows/s": f"{num_rows / read_s:,.0f}",
        "blocks": f"{len(shard.lines or ()):,}",
        "peak MB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
    }
    if way == "bulk":
        print("  ".join(f"{name:>14}" for name in columns))
    print("  ".join(f"{value:>14}" for value in columns.values()))


def main(num_lines: int) -> None:
    """Write the input and measure the three ways."""
    with tempfile.TemporaryDirectory(prefix="bench-jsonl-") as directory:
        plain, zipped = Path(directory) / "rows.jsonl", Path(directory) / "rows.jsonl.gz"
        write(plain, num_lines)
        with plain.open("rb") as source, gzip.open(zipped, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target)
        measure("bulk", plain, ())
        measure("gzip", zipped, ())
        measure("line by line", plain, ("meta",))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
