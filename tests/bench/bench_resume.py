"""How long a resume takes until it could start replicas, over an output with very many committed units.

    python tests/bench/bench_resume.py --units 100000

Lays out an output with tiny parts (the fake engine's job: no model is loaded) and times what ``run`` does before its
first replica starts: the look at job and output, the second look under the lease, and the queue of what is left.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from batchinfer.audit import verify, verify_deep
from batchinfer.cluster.errors_repair import mend_errors_parts
from batchinfer.cluster.messages import ReplicaStarted
from batchinfer.cluster.prepare import Preparation, compare_with_output, prepare
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.run_record import RunRecord
from batchinfer.cluster.work_queue import WorkQueue
from batchinfer.records import Completion, RowError, UnitResult, WorkUnit
from batchinfer.report import read_status
from batchinfer.storage.layout import part_name
from batchinfer.storage.part_tables import (
    DeadRows,
    PartFormat,
    completions_table,
    errors_table,
    part_bytes,
    part_metadata,
)
from tests.jobs import fake_job, model_without_weights


def main() -> None:
    options = _options()
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-resume-", dir=options.folder) as name:
        folder = Path(name)
        with _timed(times, "build"):
            spec = fake_job(
                model_without_weights(folder / "model"),
                _write_input(folder / "in", options.units + options.pending, options.shards, options.rows_per_unit),
                folder / "out",
                execution={"rows_per_unit": options.rows_per_unit},
            )
            _write_output(prepare(spec), options.units, options.dead_share)
        with _timed(times, "first look"):
            found = prepare(spec)
        with _timed(times, "second look"):
            found = compare_with_output(found.facts, found.output)
        with _timed(times, "mend and begin"):
            mend_errors_parts(found)
            with RunRecord(found, "20260101T000001-bbbbbb") as record:
                record.begin()
        with _timed(times, "queue"):
            WorkQueue(found.pending, QueuePolicy())
        assert (found.num_units_committed, len(found.pending)) == (options.units, options.pending)
        until_replicas_s = sum(seconds for step, seconds in times.items() if step != "build")
        facts: dict[str, object] = {
            "units": options.units,
            "dead_letters": found.num_dead_letters,
            **{step: round(seconds, 2) for step, seconds in times.items()},
            "until replicas start": round(until_replicas_s, 2),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        if options.status:
            with _timed(times, "status"):
                status = read_status(str(folder / "out"))
            assert status.num_units_committed == options.units
            facts["status"] = round(times["status"], 2)
        for check in (verify, verify_deep) if options.verify else ():
            with _timed(times, check.__name__):
                report = check(str(folder / "out"))
            facts[f"{check.__name__} rows/s"] = round(report.num_rows_completed / times[check.__name__])
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in facts.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000, help="committed units")
    parser.add_argument("--pending", type=int, default=1000, help="units left to do")
    parser.add_argument("--shards", type=int, default=101)
    parser.add_argument("--rows-per-unit", type=int, default=10)
    parser.add_argument("--dead-share", type=float, default=0.05, help="share of units that have a dead letter")
    parser.add_argument("--verify", action="store_true", help="time verify and verify_deep too")
    parser.add_argument("--status", action="store_true", help="time status too")
    parser.add_argument("--folder", help="where to build (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@contextmanager
def _timed(times: dict[str, float], step: str) -> Iterator[None]:
    started_s = time.perf_counter()
    yield
    times[step] = time.perf_counter() - started_s


def _write_input(directory: Path, num_units: int, num_shards: int, rows_per_unit: int) -> Path:
    directory.mkdir()
    num_rows = num_units * rows_per_unit
    edges = [rows_per_unit * (num_units * shard // num_shards) for shard in range(num_shards)] + [num_rows]
    for shard in range(num_shards):
        ids = range(edges[shard], edges[shard + 1])
        table = pa.table({"id": ids, "prompt": [f"prompt {number}" for number in ids]})
        pq.write_table(table, directory / f"part-{shard:05d}.parquet")
    return directory


def _write_output(found: Preparation, num_units: int, dead_share: float) -> None:
    """Parts as replicas write them, but for the syncing of each to the disk."""
    with RunRecord(found, "20260101T000000-aaaaaa") as record:
        record.begin()
        record.event("replica_starting", replica=0)
        record.replica_ready(0, ReplicaStarted(256, "fake", "none", "node", 1.0))
        for number, unit in enumerate(found.plan.units[:num_units]):
            record.unit_leased(0, unit.unit_id, 1, 0)
            record.unit_committed(0, _result(unit, num_dead=int(_is_dead(number, dead_share))))
    root = Path(found.output.uri)
    for name in ("completions", "errors"):
        (root / name).mkdir()
    part = PartFormat(found.fingerprint.digest, "run", ("id", "prompt"), compression="none")
    for number, unit in enumerate(found.plan.units[:num_units]):
        _write_parts(root, unit, part, is_dead=_is_dead(number, dead_share))


def _is_dead(number: int, dead_share: float) -> bool:
    """Whether the unit has a dead letter."""
    return bool(dead_share) and number % max(1, round(1 / dead_share)) == 0


def _result(unit: WorkUnit, num_dead: int) -> UnitResult:
    return UnitResult(
        unit.unit_id,
        unit.num_rows,
        unit.num_rows - num_dead,
        num_dead,
        5 * unit.num_rows,
        3 * unit.num_rows,
        1.0,
        dead_letters_by_type={"too_long": num_dead} if num_dead else {},
    )


def _write_parts(root: Path, unit: WorkUnit, part: PartFormat, *, is_dead: bool) -> None:
    ids = range(unit.first_row, unit.first_row + unit.num_rows)
    rows = pa.table({"id": ids, "prompt": [f"prompt {number}" for number in ids]})
    dead = np.arange(int(is_dead), dtype=np.int64)
    alive = np.arange(int(is_dead), unit.num_rows, dtype=np.int64)
    completions = [Completion(unit.row_id(int(k)), 0, f"answer {k}", (1, 2, 3), "stop", 5) for k in alive]
    metadata = part_metadata(unit, part, len(alive), len(dead))
    name = part_name(unit.unit_id)
    table = completions_table(rows, alive, completions, part, metadata)
    (root / "completions" / name).write_bytes(part_bytes(table, DeadRows.of(unit, dead), "none"))
    if is_dead:
        errors = [RowError(unit.row_id(0), "too_long", "too long")]
        table = errors_table(unit, rows, dead, errors, part, metadata)
        (root / "errors" / name).write_bytes(part_bytes(table, DeadRows.of(unit, dead), "none"))


if __name__ == "__main__":
    main()
