"""`run --chaos` on real processes: what it kills, breaks and steals is survived, counted and proven."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from batchinfer.audit import verify_deep
from batchinfer.job_file import parse_job
from tests.faults.in_process import one_machine, run_quietly
from tests.faults.runs import PATIENCE_S
from tests.jobs import job_values, model_without_weights, read_rows, write_input, write_job_file

#: 200 rows come to about 740 tokens, some 5 seconds of two replicas' work.
ROWS = [100, 100]
SPEED = {"kind": "fake", "fake": {"tokens_per_s": 80.0}}
EXECUTION = {"rows_per_unit": 8, "journal_interval_s": 0.5, "lease_timeout_s": 6.0}
CLUSTER = {"replicas": 2, "num_cpus": 1}


#: With it, of the first run, replicas die at an early call and the driver at one behind that; the second run is quiet.
SEED = 744


def chaos(job_file: Path, spec: str, seed: int) -> subprocess.CompletedProcess[str]:
    with (job_file.parent / "chaos.log").open("w") as log:
        return subprocess.run(
            [sys.executable, "-m", "batchinfer", "run", str(job_file), "--chaos", spec, "--seed", str(seed), "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=4 * PATIENCE_S,
            check=False,
        )


def test_a_job_under_chaos_ends_with_the_rows_of_a_quiet_one(tmp_path: Path) -> None:
    """Driver and replicas are killed, one write is torn, one call in twenty fails, the lease is stolen."""
    values = job_values(
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", ROWS),
        tmp_path / "out",
        engine=SPEED,
        execution=EXECUTION,
        cluster=CLUSTER,
    )
    job_file = write_job_file(tmp_path / "job.yaml", values)
    spec = "kill-replica=0.06,kill-driver=0.01,tear=0.01,fail=0.05,delay=0.02:0.05,expire-lease=0.01,runs=1"
    ended = chaos(job_file, spec, seed=SEED)
    assert ended.returncode == 0, (tmp_path / "chaos.log").read_text()[-3000:]
    report = json.loads(ended.stdout)
    assert report["num_driver_kills"] >= 1
    assert report["num_replica_kills"] >= 1
    assert (report["num_rows_lost"], report["num_rows_doubled"]) == (0, 0)
    # 1: rows that chaos made look like poison; the retry behind it ends with 0.
    assert set(report["exit_codes"]) <= {0, 1, 3, -signal.SIGKILL}
    assert report["exit_codes"][-1] == 0
    assert verify_deep(str(tmp_path / "out")).verdict == "complete"
    values["output"] = {"path": str(tmp_path / "quiet")}
    values["engine"], values["cluster"] = {"kind": "fake"}, {"num_cpus": 1}
    with one_machine():
        run_quietly(parse_job(values))
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "quiet")
