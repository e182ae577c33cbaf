"""A run that is told to stop: within ten seconds it is gone, with 3, and what it had generated is not lost."""

import contextlib
import ipaddress
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import batchinfer
from batchinfer.errors import RunInterrupted
from batchinfer.progress import ProgressView
from batchinfer.telemetry import RunProgress
from tests.faults.runs import PATIENCE_S, SLOW_FAKE, CommandRun, ended, num_parts, write_job
from tests.jobs import job, job_values, model_without_weights, read_rows, write_input, write_job_file

EXIT_S = 10.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_without_weights(tmp_path / "model")


class StopsAt(ProgressView):
    """Sets an event as soon as so many rows are done."""

    def __init__(self, num_rows: int) -> None:
        self.stop = threading.Event()
        self._num_rows = num_rows

    def show(self, progress: RunProgress) -> None:
        if progress.num_rows_committed + progress.num_rows_finished >= self._num_rows:
            self.stop.set()

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("ray_session")
def test_an_event_stops_a_run_and_the_next_one_goes_on_from_its_journal(tmp_path: Path, model: Path) -> None:
    """From a thread, where no signal arrives, and on a Ray that is not the run's own."""
    write_input(tmp_path / "in", [60])
    blocks = {"execution": {"rows_per_unit": 60}, "sampling": {"max_new_tokens": 12, "n": 2, "temperature": 1.0}}
    slow = job(
        model, tmp_path / "in", tmp_path / "out", engine={"kind": "fake", "fake": {"tokens_per_s": 60}}, **blocks
    )
    view = StopsAt(10)
    raised: list[BaseException] = []

    def body() -> None:
        try:
            batchinfer.run(slow, view, stop=view.stop)
        except RunInterrupted as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    assert view.stop.wait(PATIENCE_S)
    thread.join(EXIT_S)
    assert not thread.is_alive()
    (error,) = raised
    told = re.search(
        r"0 of 60 rows are committed, (\d+) rows and (\d+) tokens of others are journaled; run", str(error)
    )
    assert told is not None, str(error)
    assert int(told[1]) >= 10
    assert list((tmp_path / "out" / "_job" / "journal").rglob("*.arrow"))

    fast = job(model, tmp_path / "in", tmp_path / "out", engine={"kind": "fake"}, **blocks)
    result = batchinfer.run(fast)
    assert result.outcome == "complete"
    assert result.num_resumed_tokens >= int(told[2]) > 0
    batchinfer.run(job(model, tmp_path / "in", tmp_path / "quiet", engine={"kind": "fake"}, **blocks))
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "quiet")
    assert not list((tmp_path / "out" / "_job").rglob("*.arrow"))


def command_of(job_file: Path, *, planning_s: float = 0.0) -> list[str]:
    """``batchinfer run JOB``, whose reading of the input takes so long."""
    code = (
        "import sys, time\nimport batchinfer.cluster.prepare as prepare\nfrom batchinfer.cli import main\n"
        "plan_input = prepare.plan_input\n"
        "def slow(*arguments):\n"
        f"    print('planning', file=sys.stderr, flush=True)\n    time.sleep({planning_s})\n"
        "    return plan_input(*arguments)\n"
        f"prepare.plan_input = slow\nsys.argv = ['batchinfer', 'run', {str(job_file)!r}]\nmain()\n"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("moment", "planning_s", "start_s"),
    [("planning", 60.0, 0.0), ("raylet", 0.0, 0.0), ("ray::Replica", 0.0, 60.0)],
)
def test_a_signal_before_anything_is_generated_leaves_nothing(
    tmp_path: Path, model: Path, moment: str, planning_s: float, start_s: float
) -> None:
    """The last moment is also a good one to see that nothing listens but on loopback: all of Ray is there."""
    write_input(tmp_path / "in", [20])
    values = job_values(model, tmp_path / "in", tmp_path / "out", engine={"kind": "fake", "fake": {"start_s": start_s}})
    command = command_of(write_job_file(tmp_path / "job.yaml", values), planning_s=planning_s)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        everything = psutil.Process(process.pid)
        wait_for(
            lambda: (
                moment in (tmp_path / "log").read_text()
                or any(moment in command_line(child) for child in everything.children(recursive=True))
            )
        )
        if moment == "ray::Replica":
            assert listening_beyond_this_machine([everything, *everything.children(recursive=True)]) == []
        asked_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        # What Ray starts after the signal counts too.
        children = set(everything.children(recursive=True))
        while process.poll() is None:
            assert time.monotonic() - asked_s < EXIT_S, (tmp_path / "log").read_text()
            with contextlib.suppress(psutil.NoSuchProcess):
                children.update(everything.children(recursive=True))
            time.sleep(0.02)
        assert process.returncode == 3, (tmp_path / "log").read_text()
    finally:
        process.kill()
    written = (tmp_path / "log").read_text()
    assert "run the same command again" in written
    assert "Traceback" not in written
    assert not (tmp_path / "out").exists()
    # Ray's agents, left alone, last a minute; after the deadline nobody is there to end them.
    wait_for(lambda: ended(list(children)), patience_s=PATIENCE_S if "something hangs" in written else 20.0)


@pytest.mark.parametrize(("num_signals", "exit_s"), [(1, EXIT_S), (2, 4.0)], ids=["deadline", "second-signal"])
def test_a_replica_that_hangs_cannot_hold_the_run(
    tmp_path: Path, exaone: Path, num_signals: int, exit_s: float
) -> None:
    write_input(tmp_path / "in", [160])
    run = CommandRun(write_job(tmp_path, exaone, engine=SLOW_FAKE, execution={"rows_per_unit": 8}))
    run.wait_for(lambda: num_parts(tmp_path / "out") >= 1)
    (replica,) = run.replicas()
    replica.suspend()
    try:
        asked_s = time.monotonic()
        for _ in range(num_signals):
            run.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert run.wait() == 3, run.log.read_text()
        assert time.monotonic() - asked_s < exit_s
        assert "run the same command again" in run.log.read_text()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            replica.resume()
    wait_for(lambda: ended([replica]))


def wait_for(happened: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    until_s = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.02)


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def listening_beyond_this_machine(processes: list[psutil.Process]) -> list[str]:
    """Sockets of these processes that another machine could connect to."""
    found = []
    num_listening = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections():
                if connection.status == psutil.CONN_LISTEN:
                    num_listening += 1
                    address = ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))
                    if not address.is_loopback:
                        found.append(f"{command_line(process)[:80]}: {connection.laddr}")
    assert num_listening >= 8, "these are not all of Ray's processes"
    return found
