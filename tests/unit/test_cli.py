"""The commands: help, exit codes, and with --json one JSON object on stdout and nothing else there."""

import importlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from batchinfer import errors
from batchinfer.cli import main
from batchinfer.cluster.result import JobResult
from batchinfer.progress import LineProgress
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part
from tests.jobs import command, job_values, model_without_weights, write_input, write_job_file
from tests.outputs import begin_job, finished_job, planned, publish, write_shard

COMMANDS = sorted(main.commands.keys() - {"completion"})
#: Commands that take a job file; the others take an output.
ON_JOBS = ("plan", "retry-failed", "run", "submit")
#: Class -> the exit code that the tree in ``errors`` promises for it.
EXIT_CODES = {
    "SpecError": 2,
    "InputError": 2,
    "ModelError": 2,
    "OutputError": 2,
    "FingerprintMismatch": 2,
    "PoorQuality": 2,
    "JobError": 2,
    "RunInterrupted": 3,
    "LeaseHeld": 3,
    "LeaseLost": 3,
    "ClusterLost": 3,
    "StorageUnavailable": 3,
    "UnitsGivenUp": 3,
    "AllowanceSpent": 3,
    "PartExists": 3,
    "ShardCorrupt": 3,
    "BatchinferError": 3,
}


def only_object(result: Result) -> dict[str, Any]:
    """stdout as the one JSON object it must be."""
    written = json.loads(result.stdout)
    assert isinstance(written, dict)
    return written


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    model = model_without_weights(tmp_path / "model")
    values = job_values(model, write_input(tmp_path / "in", [20]), tmp_path / "out", engine={"kind": "fake"})
    return write_job_file(tmp_path / "job.yaml", values)


def failing_status(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def read_status(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("batchinfer.report.read_status", read_status)


# Help and usage ----------------------------------------------------------------------------------------


def test_the_group_lists_every_command() -> None:
    result = command("--help")
    assert result.exit_code == 0
    assert COMMANDS == ["export", "plan", "report", "retry-failed", "run", "show", "status", "submit", "verify"]
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_and_json(name: str, flag: str) -> None:
    result = command(name, flag)
    assert result.exit_code == 0
    assert f"Usage: main {name} [OPTIONS] {'JOB' if name in ON_JOBS else 'OUTPUT'}" in result.stdout
    assert "--json" in result.stdout
    # An example to copy, beside the usage line.
    assert f"\n  batchinfer {name} " in result.stdout
    assert ("--set KEY=VALUE" in result.stdout) == (name in ON_JOBS)
    assert ("--storage-options" in result.stdout) == (name not in ON_JOBS)


def test_the_version_is_said() -> None:
    assert command("--version").stdout.startswith("batchinfer, version ")


@pytest.mark.parametrize("arguments", [("frobnicate",), ("run",), ("status", "out", "--no-such-option")])
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    assert command(*arguments).exit_code == 2


# Exit codes --------------------------------------------------------------------------------------------


def test_no_error_class_is_forgotten() -> None:
    assert set(EXIT_CODES) == set(errors.__all__) - {"RowRejected"}


@pytest.mark.parametrize(("name", "exit_code"), EXIT_CODES.items())
def test_every_error_ends_with_its_exit_code_and_its_message(
    monkeypatch: pytest.MonkeyPatch, name: str, exit_code: int
) -> None:
    failing_status(monkeypatch, getattr(errors, name)("bucket [x] is gone; create it"))
    result = command("status", "out")
    assert result.exit_code == exit_code
    assert result.stderr == "Error: bucket [x] is gone; create it\n"
    assert result.stdout == ""

    in_json = command("status", "out", "--json")
    assert in_json.exit_code == exit_code
    assert only_object(in_json) == {
        "outcome": "error",
        "exit_code": exit_code,
        "error_type": name,
        "error": "bucket [x] is gone; create it",
    }


def test_a_rejected_row_that_reaches_the_top_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_status(monkeypatch, errors.RowRejected("too_long", "4097 tokens"))
    result = command("status", "out")
    assert (result.exit_code, result.stderr) == (3, "Error: too_long: 4097 tokens\n")


def test_what_nobody_foresaw_never_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 says that the job is finished with dead letters, which is also what Python and click say by default."""
    failing_status(monkeypatch, RuntimeError("a mistake of ours"))
    result = command("status", "out", "--json")
    assert result.exit_code == 3
    assert only_object(result)["error_type"] == "RuntimeError"
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_a_run_ends_with_3(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """While heavy packages are imported, say."""

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("batchinfer.report.read_status", interrupted)
    # A shell starts what it runs in the background with SIGINT ignored, and so may whatever runs these tests.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = command("status", "out", "--json")
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert result.exit_code == 3
    assert only_object(result)["error_type"] == "RunInterrupted"
    assert "run the same command again" in result.stderr
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_status(monkeypatch, BrokenPipeError())
    assert command("status", "out").exit_code == 0


def test_verify_deep_reads_all_and_says_so(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, dead=[1])
    whole = command("verify", str(output), "--deep")
    assert whole.exit_code == 1
    assert "checksums taken" in whole.stdout
    place = completions_part(output, plan.units[1].unit_id)
    content = bytearray(place.read_bytes())
    content[60] ^= 1
    Path(place.uri).write_bytes(content)
    (tmp_path / "in" / "a.parquet").unlink()
    assert command("verify", str(output)).exit_code == 1
    spoilt = json.loads(command("verify", str(output), "--deep", "--json").stdout)
    assert (spoilt["verdict"], [finding["kind"] for finding in spoilt["findings"]]) == ("damaged", ["damaged_part"])
    assert [remark["kind"] for remark in spoilt["remarks"]] == ["input_out_of_reach"]
    wrong = command("verify", str(output), "--deep", "--input-storage-options", "{")
    assert (wrong.exit_code, "not valid JSON" in wrong.stderr) == (2, True)


def test_the_code_of_verify_is_its_verdicts(tmp_path: Path) -> None:
    complete, _ = finished_job(tmp_path / "a")
    with_dead, _ = finished_job(tmp_path / "b", dead=[1])
    damaged, plan = finished_job(tmp_path / "c")
    part = next((tmp_path / "c" / "out" / "completions").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    started = locate(str(tmp_path / "d"))
    begin_job(started, plan)
    for output, exit_code in ((complete, 0), (with_dead, 1), (damaged, 2), (started, 3)):
        result = command("verify", str(output), "--json")
        assert result.exit_code == exit_code, result.output
        assert only_object(result)["output"] == str(output)


# What the commands do ----------------------------------------------------------------------------------


def result_of(**values: Any) -> JobResult:
    counts = dict.fromkeys(
        (
            "num_rows_committed_before",
            "num_dead_letters",
            "num_completions",
            "num_prompt_tokens",
            "num_completion_tokens",
        ),
        0,
    )
    return JobResult(
        **{
            "run_id": "run",
            "output": "out",
            "fingerprint": "f" * 16,
            "num_rows": 20,
            "num_rows_committed": 20,
            "num_units": 2,
            "num_units_committed": 2,
            "elapsed_s": 2.0,
            "generation_s": 1.0,
            **counts,
            **values,
        }
    )


@pytest.mark.parametrize(
    ("values", "exit_code"), [({}, 0), ({"num_dead_letters": 1}, 1), ({"num_units_committed": 1}, 3)]
)
def test_run_ends_with_the_code_of_its_result(
    monkeypatch: pytest.MonkeyPatch, job_file: Path, values: dict[str, Any], exit_code: int
) -> None:
    seen: list[object] = []

    def run(*arguments: object, **options: object) -> JobResult:
        seen.extend(arguments)
        return result_of(**values)

    monkeypatch.setattr("batchinfer.cluster.driver.run", run)
    result = command("run", job_file, "--set", "sampling.seed=7", "--set", "name=mine", "--json")
    assert result.exit_code == exit_code
    assert only_object(result)["exit_code"] == exit_code
    spec, view = seen
    assert (spec.name, spec.sampling.seed) == ("mine", 7)  # type: ignore[attr-defined]
    assert isinstance(view, LineProgress)
    assert command("run", job_file).exit_code == exit_code


def test_run_refuses_a_wrong_job_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    result = command("run", tmp_path / "nowhere.yaml", "--json")
    assert result.exit_code == 2
    assert only_object(result)["error_type"] == "SpecError"
    assert "nowhere.yaml: the job file cannot be read" in result.stderr


def test_plan_says_what_run_would_do_and_writes_nothing(job_file: Path, tmp_path: Path) -> None:
    result = command("plan", job_file, "--json", "--sample", "0", "--set", "execution.rows_per_unit=8")
    assert result.exit_code == 0
    written = only_object(result)
    assert (written["num_shards"], written["num_rows"], written["num_units"]) == (1, 20, 3)
    assert (written["num_rows_pending"], written["num_rows_committed"]) == (20, 0)
    assert written["is_new"] is True
    assert (written["prompts"], written["memory"], written["estimate"]) == (None, None, None)
    assert not (tmp_path / "out").exists()
    text = command("plan", job_file, "--sample", "0")
    assert text.exit_code == 0
    assert "begins a new output" in text.stdout


def test_status_ends_with_0_whatever_the_state(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    publish(output, plan, plan.units[0], dead=[4])
    result = command("status", tmp_path / "out", "--json")
    assert result.exit_code == 0
    written = only_object(result)
    assert (written["state"], written["num_rows_committed"], written["num_dead_letters"]) == ("unfinished", 10, 1)
    assert "not finished, nobody is working on it" in command("status", tmp_path / "out").stdout


@pytest.mark.parametrize("name", ["status", "verify", "show"])
def test_an_output_that_is_none_ends_with_2(tmp_path: Path, name: str) -> None:
    result = command(name, tmp_path / "nowhere", "--json")
    assert result.exit_code == 2
    assert "nowhere" in only_object(result)["error"]


def test_show_prints_as_many_rows_as_asked_for(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    result = command("show", str(output), "--json", "-n", "5")
    assert [row["id"] for row in only_object(result)["rows"]] == [0, 1, 2, 3, 4]
    assert "answer 0.0" in command("show", str(output)).stdout
    assert len(only_object(command("show", str(output), "--json"))["rows"]) == 3


@pytest.mark.parametrize("name", ["status", "verify", "show"])
@pytest.mark.parametrize("options", ['{"secret": "hunter2"', '["hunter2"]', "hunter2"])
def test_storage_options_that_are_no_json_object_are_refused_unseen(name: str, options: str) -> None:
    result = command(name, "out", "--json", "--storage-options", options)
    assert result.exit_code == 2
    assert only_object(result)["error"].startswith("--storage-options: ")
    assert "hunter2" not in result.output


def test_storage_options_reach_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def read_status(*arguments: object) -> None:
        seen.extend(arguments)
        raise errors.OutputError("no job there")

    monkeypatch.setattr("batchinfer.report.read_status", read_status)
    command("status", "s3://bucket/out", "--storage-options", '{"anon": true}')
    assert seen == ["s3://bucket/out", {"anon": True}]


def test_python_m_is_the_same_program() -> None:
    assert importlib.import_module("batchinfer.__main__").main is main
