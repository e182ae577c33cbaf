"""The files for cron, systemd, Slurm, Airflow and KubeRay: each is read by what reads it, where that is at hand.

Slurm's script and KubeRay's entry point run for real, with stand-ins for the commands they call. The DAG runs in a
real Airflow where the environment variable AIRFLOW names its Python (``AIRFLOW=/opt/airflow/bin/python``); elsewhere it
runs with stand-ins for the names it imports.
"""

import ast
import configparser
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import batchinfer
from batchinfer.job_file import parse_job
from tests.jobs import job_values

ROOT = Path(batchinfer.__file__).parent.parent
SCHEDULERS = ROOT / "jobs" / "schedulers"
DAG_FILE = SCHEDULERS / "airflow_dag.py"

#: Exit codes of the run to what the scheduler is to see.
Stub = Callable[[str, str], None]


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    """Writes an executable shell script into a directory of its own, which is PATH's first."""
    (tmp_path / "bin").mkdir()

    def stub(name: str, body: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n{body}\n', encoding="utf-8")
        path.chmod(0o755)

    return stub


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
    return {**clean, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **changes}


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "called").read_text(encoding="utf-8").splitlines()


# What every file says to batchinfer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crontab", "batchinfer.service"])
def test_settings_are_keys_of_the_job_file(name: str) -> None:
    text = (SCHEDULERS / name).read_text(encoding="utf-8")
    settings = re.findall(r"^[^#\n]*--set (\S+)", text, re.MULTILINE)
    assert settings
    parse_job(job_values("model", "in", "out"), settings)


# cron ------------------------------------------------------------------------------------------------------------


def test_the_crontabs_line_is_five_fields_and_a_command(tmp_path: Path, stub: Stub) -> None:
    lines = (SCHEDULERS / "crontab").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z]+=", line)]
    *fields, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[*\d,/-]+", field) for field in fields)
    assert "%" not in command, "cron takes it for the end of the line"
    stub("batchinfer", 'echo "key $SOME_KEY"')
    (tmp_path / "environment").write_text("SOME_KEY=secret\n", encoding="utf-8")
    command = command.replace("/etc/batchinfer", str(tmp_path)).replace("/var/log/batchinfer", str(tmp_path))
    subprocess.run(["sh", "-c", command], check=True, env=environment(tmp_path))
    assert (tmp_path / "nightly.log").read_text(encoding="utf-8") == "key secret\n"


# systemd ---------------------------------------------------------------------------------------------------------


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    service = (SCHEDULERS / "batchinfer.service").read_text(encoding="utf-8")
    service = service.replace("/opt/batchinfer/bin/batchinfer", "/bin/true").replace("User=batchinfer", "User=root")
    (tmp_path / "batchinfer.service").write_text(service, encoding="utf-8")
    shutil.copy(SCHEDULERS / "batchinfer.timer", tmp_path)
    units = [str(tmp_path / name) for name in ("batchinfer.service", "batchinfer.timer")]
    verified = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_service_maps_exit_codes_and_leaves_time_to_drain() -> None:
    # Keys may be given twice, as the timer's are.
    units = configparser.RawConfigParser(strict=False)
    units.optionxform = str  # type: ignore[assignment,method-assign]
    units.read(SCHEDULERS / "batchinfer.service", encoding="utf-8")
    service = units["Service"]
    assert service["SuccessExitStatus"] == "1"
    # A restart at once, after a deadline given as a time of day, would run through the day.
    assert "execution.deadline=06:00" in service["ExecStart"]
    assert "RestartForceExitStatus" not in service
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 10


# Slurm -----------------------------------------------------------------------------------------------------------

SCRIPT = str(SCHEDULERS / "slurm.sbatch")


def slurm(tmp_path: Path, **changes: str) -> "subprocess.Popen[str]":
    variables = environment(tmp_path, **{"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", **changes})
    return subprocess.Popen(
        ["bash", SCRIPT, "job.yaml", "--set", "name=two words"], env=variables, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("code", "ends_with", "requeued"), [(0, 0, False), (1, 0, False), (2, 2, False), (3, 0, True)])
def test_slurm_maps_exit_codes(tmp_path: Path, stub: Stub, code: int, ends_with: int, requeued: bool) -> None:
    stub("batchinfer", f'[ "$4" = "name=two words" ] && exit {code}; exit 9')
    stub("scontrol", "exit 0")
    with slurm(tmp_path) as process:
        process.communicate(timeout=30)
    assert process.returncode == ends_with
    assert ("scontrol requeue 17" in called(tmp_path)) is requeued


def test_slurms_signal_drains_the_run_and_puts_the_job_back(tmp_path: Path, stub: Stub) -> None:
    stub("batchinfer", f"trap 'sleep 0.3; exit 3' TERM; touch {tmp_path}/began; while :; do sleep 0.05; done")
    stub("scontrol", "exit 0")
    with slurm(tmp_path) as process:
        until_s = time.monotonic() + 30
        while not (tmp_path / "began").exists():
            assert time.monotonic() < until_s
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert called(tmp_path)[-1] == "scontrol requeue 17"


def test_a_job_that_was_put_back_too_often_fails(tmp_path: Path, stub: Stub) -> None:
    stub("batchinfer", "exit 3")
    stub("scontrol", "exit 0")
    with slurm(tmp_path, SLURM_RESTART_COUNT="50") as process:
        process.communicate(timeout=30)
    assert process.returncode == 3
    assert not any(line.startswith("scontrol requeue") for line in called(tmp_path))


def test_several_nodes_get_a_ray_with_a_token_that_ends_with_the_job(tmp_path: Path, stub: Stub) -> None:
    ready = tmp_path / "ready"
    waits = f"while [ ! -e {ready} ]; do sleep 0.02; done"
    stub("batchinfer", f'{waits}; echo "$RAY_ADDRESS $RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}}"; exit 0')
    stub("scontrol", 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; fi')
    # Options first, then the command, as srun has it.
    stub("srun", 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"')
    stub("hostname", "echo 192.0.2.1 198.51.100.1")
    ends = f"trap 'echo ray ended >> {tmp_path}/called; exit 0' TERM"
    stub("ray", f"{ends}; [ $2 = --head ] && touch {ready}; while kill -0 $PPID; do sleep 0.05; done")
    with slurm(tmp_path, SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]") as process:
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert printed == "192.0.2.1:6379 token 64\n"
    assert any("--set cluster.address=auto" in line for line in called(tmp_path) if line.startswith("batchinfer run"))
    assert any(line.startswith("ray start --head --node-ip-address=192.0.2.1") for line in called(tmp_path))
    assert "ray ended" in called(tmp_path)


# KubeRay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "ends_well"), [(0, True), (1, True), (2, False), (3, False)])
def test_kuberays_entry_point_maps_exit_codes(tmp_path: Path, stub: Stub, code: int, ends_well: bool) -> None:
    manifest = yaml.safe_load((ROOT / "docker" / "kuberay-rayjob.yaml").read_text(encoding="utf-8"))
    stub("batchinfer", f"exit {code}")
    # KubeRay's submitter hands it to a shell and that to `ray job submit`, which quotes the words once more.
    command = shlex.join(shlex.split(manifest["spec"]["entrypoint"]))
    ended = subprocess.run(["sh", "-c", command], env=environment(tmp_path), check=False)
    assert (ended.returncode == 0) is ends_well
    assert yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "15"


# Airflow ---------------------------------------------------------------------------------------------------------


def test_the_dag_needs_airflow_and_the_standard_library_alone() -> None:
    found = [node for node in ast.walk(ast.parse(DAG_FILE.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    airflow = {
        (node.module, alias.name) for node in found for alias in node.names if (node.module or "").startswith("a")
    }
    assert airflow == {
        ("airflow.sdk", "DAG"),
        ("airflow.sdk", "BaseOperator"),
        ("airflow.sdk.exceptions", "AirflowFailException"),
    }


class FailedForGood(Exception):
    """Stands in for AirflowFailException."""


class Task:
    """Stands in for BaseOperator."""

    log = getLogger("airflow.task")

    def __init__(self, **given: object) -> None:
        self.given = given
        Day.tasks.append(self)


class Day:
    """Stands in for DAG."""

    tasks: list[Task]

    def __init__(self, **given: object) -> None:
        self.given = given
        Day.tasks = []

    def __enter__(self) -> "Day":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def module(name: str, **names: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Task:
    """The DAG's only task, its command in the stubs' directory."""
    for name, made in (
        ("airflow", module("airflow")),
        ("airflow.sdk", module("airflow.sdk", DAG=Day, BaseOperator=Task)),
        ("airflow.sdk.exceptions", module("airflow.sdk.exceptions", AirflowFailException=FailedForGood)),
    ):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setenv("BATCHINFER", str(tmp_path / "bin" / "batchinfer"))
    runpy.run_path(str(DAG_FILE))
    (found,) = Day.tasks
    return found


CONTEXT: Mapping[str, object] = {"dag_run": SimpleNamespace(start_date=datetime(2026, 11, 23, 22, tzinfo=UTC))}


@pytest.mark.parametrize(
    ("code", "outcome"), [(0, 0), (1, 1), (2, FailedForGood), (3, RuntimeError), (9, RuntimeError)]
)
def test_the_dag_maps_exit_codes(tmp_path: Path, stub: Stub, task: Task, code: int, outcome: object) -> None:
    stub("batchinfer", f"exit {code}")
    execute = task.execute  # type: ignore[attr-defined]
    if isinstance(outcome, type):
        with pytest.raises(outcome):
            execute(CONTEXT)
    else:
        assert execute(CONTEXT) == outcome
    deadline = "--set execution.deadline=2026-11-24T06:00:00+00:00"
    assert called(tmp_path) == [f"batchinfer run /etc/batchinfer/nightly.yaml {deadline}"]


def test_a_killed_task_drains_its_run(tmp_path: Path, stub: Stub, task: Task) -> None:
    stub("batchinfer", f"trap 'touch {tmp_path}/drained; exit 3' TERM; while :; do sleep 0.05; done")
    process = subprocess.Popen([str(tmp_path / "bin" / "batchinfer")])
    while not (tmp_path / "called").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    task._process = process  # type: ignore[attr-defined]
    task.on_kill()  # type: ignore[attr-defined]
    assert process.returncode == 3
    assert (tmp_path / "drained").exists()


@pytest.mark.slow
def test_a_real_airflow_runs_the_dag(tmp_path: Path, stub: Stub) -> None:
    """1. the first try is interrupted  2. the second one finishes with dead letters  3. the DAG run is a success."""
    python = os.environ.get("AIRFLOW")
    if python is None:
        pytest.skip("AIRFLOW is not set to the Python of an environment with apache-airflow 3")
    dags = tmp_path / "dags"
    dags.mkdir()
    text = DAG_FILE.read_text(encoding="utf-8").replace("timedelta(minutes=5)", "timedelta(seconds=1)")
    (dags / "nightly.py").write_text(text, encoding="utf-8")
    stub("batchinfer", f"[ $(wc -l < {tmp_path}/called) -gt 1 ] && exit 1; exit 3")
    variables = environment(
        tmp_path,
        AIRFLOW_HOME=str(tmp_path),
        AIRFLOW__CORE__DAGS_FOLDER=str(dags),
        AIRFLOW__CORE__LOAD_EXAMPLES="False",
    )
    for arguments in (["db", "migrate"], ["dags", "test", "batchinfer_nightly"]):
        command = [python, "-m", "airflow", *arguments]
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    tries = [line for line in called(tmp_path) if line.startswith("batchinfer run")]
    assert len(tries) == 2
    assert tries[0] == tries[1], "another try must keep the first one's deadline"
