"""Planning many shards: seconds and peak memory. Prints a table; ``python tests/bench/bench_plan.py [SHARDS]``."""

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.planner import plan_input
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import read_plan, write_plan

ROWS_PER_SHARD = 100_000
ROWS_PER_UNIT = 1024


def main(num_shards: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as directory:
        root = Path(directory)
        one = root / "shard.parquet"
        table = pa.table({"id": range(ROWS_PER_SHARD), "text": pa.array(["a prompt"] * ROWS_PER_SHARD)})
        pq.write_table(table, one, row_group_size=10_000)
        for index in range(num_shards):
            target = root / "in" / f"{index // 1000:03d}" / f"part-{index:06d}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(one, target)
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        started_s = time.perf_counter()
        plan = plan_input([str(root / "in")], None, ROWS_PER_UNIT).plan
        planned_s = time.perf_counter() - started_s
        output = locate(str(root / "out"))
        started_s = time.perf_counter()
        write_plan(output, plan)
        written_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        assert read_plan(output) == plan
        read_s = time.perf_counter() - started_s
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    assert len(plan.shards) == num_shards
    columns = {
        "shards": f"{num_shards:,}",
        "rows": f"{plan.num_rows:,}",
        "units": f"{len(plan.units):,}",
        "plan s": f"{planned_s:.2f}",
        "write s": f"{written_s:.2f}",
        "read s": f"{read_s:.2f}",
        "peak MB": f"{peak_mb:.0f}",
        "before MB": f"{before_mb:.0f}",
    }
    print("  ".join(f"{name:>13}" for name in columns))
    print("  ".join(f"{value:>13}" for value in columns.values()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
