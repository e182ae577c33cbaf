"""Who starts the next run under chaos, when it ends, and what it all came to; runs are small programs here."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from batchinfer.chaos import ChaosSpec
from batchinfer.chaos_run import NUM_QUIET_RUNS, Commands, child_commands, run_under_chaos
from batchinfer.errors import LeaseHeld, RunInterrupted, SpecError
from batchinfer.spec import JobSpec
from batchinfer.storage.chaos_faults import CHAOS
from batchinfer.storage.layout import completions_part, staging
from batchinfer.storage.lease import acquire
from batchinfer.storage.location import Location
from tests.jobs import command, job, job_values, write_job_file
from tests.outputs import finished_job


@pytest.fixture
def output(tmp_path: Path) -> Location:
    """Everything is committed; one row is a dead letter."""
    return finished_job(tmp_path, num_rows=25, dead=[3])[0]


@pytest.fixture
def spec(tmp_path: Path, output: Location) -> JobSpec:
    return job(tmp_path / "model", tmp_path / "in", tmp_path / "out")


def programs(*lines: str, retry: str = "raise SystemExit('nothing is to be retried')") -> Commands:
    """The n-th run is the n-th line of Python, the last one again and again."""
    python = [sys.executable, "-S", "-c"]
    return Commands(lambda number: [*python, lines[min(number, len(lines) - 1)]], [*python, retry])


KILLED = "import os; os.kill(os.getpid(), 9)"
INTERRUPTED, DEAD_LETTERS, WRONG, STRANGE = ("raise SystemExit(%d)" % code for code in (3, 1, 2, 7))  # noqa: UP031


def test_runs_follow_one_another_until_one_ends_by_itself(spec: JobSpec) -> None:
    report = run_under_chaos(spec, programs(KILLED, INTERRUPTED, KILLED, DEAD_LETTERS), ChaosSpec(), seed=5)
    assert report.exit_codes == (-signal.SIGKILL, 3, -signal.SIGKILL, 1)
    assert (report.num_driver_kills, report.exit_code) == (2, 1)
    assert (report.num_rows_lost, report.num_rows_doubled) == (0, 0)
    assert json.loads(json.dumps(report.as_json()))["num_runs"] == 4
    assert "kills          2 (2 of the driver, 0 of replicas)" in "\n".join(report.lines())


def test_a_job_that_is_wrong_is_not_tried_again(spec: JobSpec) -> None:
    with pytest.raises(SpecError, match="the job itself is wrong"):
        run_under_chaos(spec, programs(KILLED, WRONG, STRANGE), ChaosSpec(), seed=0)


def test_runs_that_never_end_by_themselves_are_bounded(spec: JobSpec) -> None:
    report = run_under_chaos(spec, programs(INTERRUPTED), ChaosSpec(runs=2), seed=0)
    assert report.exit_codes == (3,) * (2 + NUM_QUIET_RUNS)


def test_a_run_that_says_it_has_finished_while_units_are_missing_is_not_believed(
    spec: JobSpec, output: Location
) -> None:
    unit_id = next(iter(output.child("completions").names())).removeprefix("part-").removesuffix(".parquet")
    completions_part(output, unit_id).remove()
    report = run_under_chaos(spec, programs(DEAD_LETTERS), ChaosSpec(runs=1), seed=0)
    assert len(report.exit_codes) == 1 + NUM_QUIET_RUNS
    assert (report.exit_code, report.verification.verdict) == (3, "incomplete")
    assert report.num_rows_lost in {5, 10}


def test_an_exit_code_nobody_documented_is_told(spec: JobSpec) -> None:
    report = run_under_chaos(spec, programs(STRANGE, DEAD_LETTERS), ChaosSpec(), seed=0)
    assert (report.exit_code, report.undocumented) == (3, (7,))
    assert "undocumented exit codes: 7" in report.lines()[-1]


def test_the_notes_of_the_dead_are_counted_and_those_of_earlier_chaos_are_not(spec: JobSpec, output: Location) -> None:
    def note(number: int, role: str, num_tokens: int, death: str) -> str:
        content = json.dumps({"run_number": number, "role": role, "num_tokens": num_tokens, "death": death})
        return f"open({output.uri!r} + '/{CHAOS}/run-{number:04d}-{role}.json', 'w').write({content!r})"

    old = output.child(f"{CHAOS}/run-0000-replica-9.json")
    old.write_replace(b'{"run_number": 0, "role": "replica-9", "num_tokens": 1000, "death": "x"}', staging(output))
    first = ";".join([note(0, "replica-0", 40, "after append, call 3"), note(0, "driver", 0, "x"), KILLED])
    second = ";".join([note(1, "replica-0", 41, ""), DEAD_LETTERS])
    report = run_under_chaos(spec, programs(first, second), ChaosSpec(), seed=0)
    assert (report.num_driver_kills, report.num_replica_kills) == (1, 1)
    # 24 rows of 3 tokens; 81 were generated.
    assert (report.num_tokens_generated, report.num_tokens_in_output) == (81, 72)
    assert report.redone_percent == pytest.approx(12.5)


def test_rows_that_chaos_made_look_like_poison_are_generated_by_a_retry(tmp_path: Path) -> None:
    """1. a run ends with a row that killed its replica twice  2. the retry generates it  3. that is what is audited."""
    convicted, _ = finished_job(tmp_path / "convicted", num_rows=25, dead=[3], error_type="killed_replica")
    acquitted, _ = finished_job(tmp_path / "acquitted", num_rows=25)
    where = convicted.uri.removeprefix("file://")
    retry = f"import shutil; shutil.rmtree({where!r}); shutil.copytree({acquitted.uri!r}, {where!r})"
    spec = job(tmp_path / "model", tmp_path / "convicted/in", tmp_path / "convicted/out")
    report = run_under_chaos(spec, programs(DEAD_LETTERS, retry=retry), ChaosSpec(), seed=0)
    assert (report.exit_codes, report.exit_code) == ((1, 0), 0)
    assert report.num_rows_acquitted == 1
    # The retry's row of 3 tokens was generated, too.
    assert (report.num_tokens_generated, report.num_tokens_in_output) == (3, 75)
    assert "1 rows were alone with their replica when chaos killed it twice" in "\n".join(report.lines())


def test_an_output_that_another_run_holds_is_left_alone(spec: JobSpec, output: Location) -> None:
    acquire(output, "theirs", 60)
    with pytest.raises(LeaseHeld, match="held by run theirs"):
        run_under_chaos(spec, programs(STRANGE), ChaosSpec(), seed=0)


def test_a_signal_is_passed_on_and_no_other_run_follows(spec: JobSpec, tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(said)!r}, 'a').write('term'), sys.exit(3)))\n"
        f"open({str(said)!r}, 'a').write('ready ')\ntime.sleep(60)"
    )

    def stop() -> None:
        while not said.exists() or said.read_text() != "ready ":
            ended.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = threading.Event()
    stopper = threading.Thread(target=stop)
    stopper.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterrupted, match="run again to continue"):
        run_under_chaos(spec, programs(program), ChaosSpec(), seed=0)
    stopper.join()
    assert said.read_text() == "ready term"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_children_get_the_same_job_and_a_run_its_number() -> None:
    commands = child_commands(Path("job.yaml"), ["sampling.seed=1"], "fail=0.1", 7)
    assert list(commands.run(4))[1:] == [
        *("-m", "batchinfer", "run", "job.yaml", "--set", "sampling.seed=1"),
        *("--chaos", "fail=0.1", "--seed", "7", "--chaos-run", "4"),
    ]
    assert list(commands.retry)[1:] == [
        *("-m", "batchinfer", "retry-failed", "job.yaml", "--set", "sampling.seed=1"),
        *("--error-type", "killed_replica"),
    ]


def test_a_mistake_in_the_spec_ends_the_command_with_2_before_anything_runs(tmp_path: Path) -> None:
    job_file = write_job_file(tmp_path / "job.yaml", job_values(tmp_path, tmp_path / "in", tmp_path / "out"))
    ended = command("run", job_file, "--chaos", "kill-replcia=0.1")
    assert ended.exit_code == 2
    assert "did you mean kill-replica?" in ended.output
    assert not (tmp_path / "out").exists()
