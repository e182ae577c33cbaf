"""What the commands print for people: the facts, names as they are, and no credential."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.audit import Finding, Remark, VerifyReport, verify
from batchinfer.cli_text import (
    plan_json,
    print_plan,
    print_result,
    print_rows,
    print_status,
    print_verification,
)
from batchinfer.cluster.prepare import Preparation, prepare
from batchinfer.cluster.result import GivenUpUnit, JobResult
from batchinfer.records import UnreadableShard
from batchinfer.report import Holder, LastRun, Status
from batchinfer.report.run_now import RunNow
from batchinfer.telemetry import ReplicaLook
from tests.jobs import fake_job, model_without_weights, write_input
from tests.outputs import finished_job

#: Rich reads square brackets as markup and :smile: as a face, unless told otherwise.
ODD = "/out/[red] run [1]"
RESULT = JobResult(
    run_id="20260101T000000-aaaaaa",
    output=ODD,
    fingerprint="f" * 16,
    num_rows=2000,
    num_rows_committed=2000,
    num_rows_committed_before=500,
    num_units=4,
    num_units_committed=4,
    num_dead_letters=0,
    num_completions=1500,
    num_prompt_tokens=100_000,
    num_completion_tokens=200_000,
    elapsed_s=110.0,
    generation_s=100.0,
)
STATUS = Status(
    state="running",
    name="[job]",
    output=ODD,
    fingerprint="f" * 16,
    num_shards=3,
    num_unreadable_shards=1,
    num_units=4,
    num_units_committed=2,
    num_rows=4000,
    num_rows_committed=2000,
    num_dead_letters=7,
    holder=Holder("run-9", "gpu-17", 4242, "2026-01-02T03:04:05+00:00", "2026-01-02T03:05:05+00:00"),
    last_run=LastRun(
        "run-9", "2026-01-02T03:04:05+00:00", "2026-01-02T03:04:15+00:00", "unit_committed", 2, 1000, 1, 2
    ),
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, with runs of spaces as one."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_result_of_a_run_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT)
    lines = lines_of(capsys)
    assert lines[0] == f"{ODD}: every row is committed"
    assert "rows committed 2,000 of 2,000 (500 by earlier runs)" in lines
    assert "completion tokens 200,000 (2,000/s)" in lines
    assert "time 1m50s (10s until the first replica was ready)" in lines
    assert not any("dead letters" in line or "died" in line for line in lines)


def test_a_run_with_nothing_to_do_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(replace(RESULT, run_id="", num_dead_letters=3))
    assert lines_of(capsys) == [
        f"{ODD}: everything is committed already: 2,000 rows in 4 units, 3 of them dead letters."
    ]


def test_what_is_left_is_named_with_the_way_on(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(
        replace(
            RESULT,
            num_units_committed=3,
            num_dead_letters=3,
            dead_letters_by_type={"too_long": 1, "null_prompt": 2},
            num_replicas_died=2,
            given_up=(GivenUpUnit("unit-1", "a[1].parquet", 3, "StorageUnavailable: [503]"),),
            unreadable_shards=("b[2].parquet",),
        )
    )
    lines = lines_of(capsys)
    assert lines[0] == f"{ODD}: units remain"
    assert "dead letters 3 (null_prompt 2, too_long 1)" in lines
    assert "replicas died 2" in lines
    assert "not committed unit unit-1 of a[1].parquet: StorageUnavailable: [503]" in lines
    assert "unreadable shard b[2].parquet: none of its rows was planned" in lines
    assert "Run the same command again to try what is left." in lines
    assert f"Dead letters, each with its input row and the reason: {ODD}/errors" in lines


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    source = write_input(tmp_path / "in", [40]) / "part-[01].parquet"
    return prepare(fake_job(model_without_weights(tmp_path / "model"), source, tmp_path / "out"))


def test_the_plan_says_what_would_run(preparation: Preparation, capsys: pytest.CaptureFixture[str]) -> None:
    bad = UnreadableShard("bad[3].parquet", "bad.parquet", 4, "truncated")
    planned = replace(preparation.plan, unreadable=(bad,))
    print_plan(replace(preparation, plan=planned, superseded=("unit-1",), num_dead_letters=2))
    lines = lines_of(capsys)
    assert lines[0] == f"job: begins a new output at {preparation.output}"
    assert f"input {preparation.spec.input.path}" in lines
    assert "units 3 of up to 16 rows" in lines
    assert "to generate 3 units, 40 rows" in lines
    assert "dead letters 2" in lines
    assert "passed through id, prompt" in lines
    assert "unreadable shard bad[3].parquet: truncated" in lines
    assert lines[-1].startswith("1 committed units belong to shards that have changed")


def test_the_plan_shows_no_credential(preparation: Preparation, capsys: pytest.CaptureFixture[str]) -> None:
    spec = preparation.spec
    remote = spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"path": "s3://key:hunter2@bucket/model"}),
            "input": spec.input.model_copy(update={"path": ["s3://key:hunter2@bucket/[ab]/*.parquet"]}),
        }
    )
    print_plan(replace(preparation, facts=replace(preparation.facts, spec=remote)))
    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert "s3://***@bucket/[ab]/*.parquet" in shown


def test_the_plan_as_json_is_plain_values(preparation: Preparation) -> None:
    written = json.loads(json.dumps(plan_json(preparation)))
    assert written["num_units_pending"] == 3
    assert written["num_rows_pending"] == 40
    assert written["output_columns"] == ["id", "prompt"]
    assert (written["superseded_units"], written["unreadable_shards"], written["retired_shards"]) == ([], [], [])


def test_the_status_names_holder_and_last_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(STATUS)
    lines = lines_of(capsys)
    assert lines[0] == f"[job] at {ODD}: a run is working on it"
    assert "rows committed 2,000 of 4,000" in lines
    assert "shards 3 (1 unreadable)" in lines
    assert "held by run run-9, host gpu-17, process 4242, last beat 2026-01-02T03:05:05+00:00" in lines
    assert any("2 units, 1,000 tokens (100/s), 1 replicas died, 2 unit failures" in line for line in lines)


def test_the_status_of_a_run_that_goes_on_shows_its_replicas_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    replicas = (
        ReplicaLook(0, "running", "node", "cuda:0", 3, 100.0, 200.0, 0.9, 0.5, 0.01),
        ReplicaLook(1, "starting"),
    )
    now = RunNow("run-9", 100.0, 200.0, 3, eta_s=720.0, eta_low_s=600.0, replicas=replicas)
    print_status(replace(STATUS, num_dead_letters=9, dead_letters_by_type={"empty": 2, "[too]_long": 6}, run_now=now))
    lines = lines_of(capsys)
    for line in (
        "dead letters 9 ([too]_long 6, empty 2)",
        "now 100 in 200 out tok/s, 3 units in flight",
        "time left 12m00s (10m00s or more)",
        "0 running node cuda:0 100 200 90% 50% 1% 3",
        "1 starting",
    ):
        assert line in lines
    print_status(replace(STATUS, run_now=RunNow("run-9", num_units_in_flight=2)))
    assert "now 2 units in flight" in lines_of(capsys)


def test_the_status_of_an_idle_output_names_neither(capsys: pytest.CaptureFixture[str]) -> None:
    print_status(replace(STATUS, state="complete", holder=None, last_run=None))
    lines = lines_of(capsys)
    assert lines[0].endswith(": every row is committed")
    assert not any(line.startswith(("held by", "last run")) for line in lines)


def test_the_verdict_comes_first_and_the_findings_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = finished_job(tmp_path, dead=[2])
    report = verify(str(output))
    print_verification(report)
    lines = lines_of(capsys)
    assert lines[0].startswith(f"{output}: complete, with dead letters")
    assert "dead letters 1 (too_long 1)" in lines

    found = tuple(Finding("missing_row", f"part-{number}[x]", "row 3") for number in range(12))
    damaged: VerifyReport = replace(report, verdict="damaged", findings=found)
    print_verification(damaged)
    lines = lines_of(capsys)
    assert lines[0].endswith(": damaged")
    assert "missing_row: 12" in lines
    assert "part-0[x]: row 3" in lines
    assert sum(line.startswith("part-") for line in lines) == 10
    assert lines[-1] == "and 2 more (--json names all)"
    remark = Remark("leftover_bytes", "_job/tmp", "2 files")
    print_verification(replace(report, verdict="complete", remarks=(remark,), num_bytes_checked=12345))
    lines = lines_of(capsys)
    assert "checksums taken 12,345 bytes" in lines
    assert lines[-2:] == ["leftover_bytes: 1", "_job/tmp: 2 files"]


def test_rows_are_printed_as_the_model_wrote_them_but_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(
        [
            {
                "row_id": "abc:0",
                "finish_reason": "stop",
                "prompt": "p" * 500,
                "completion": ":smile: [bold]안녕[/bold]",
            },
            {"row_id": "abc:1", "finish_reason": "length", "question": "Why?", "completion": "c" * 1000},
        ]
    )
    shown = " ".join(lines_of(capsys))
    assert ":smile: [bold]안녕[/bold]" in shown
    assert "abc:0 stop" in shown
    assert "Why?" in shown
    joined = shown.replace(" ", "")
    assert "p" * 199 + "…" in joined
    assert "c" * 599 + "…" in joined


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "last"}], "prompt": "x"},
            "last",
        ),
        ({"text": "of text", "other": "y"}, "of text"),
        ({"row_id": "r:0", "subject": "first text"}, "first text"),
    ],
)
def test_the_prompt_of_a_row_is_what_a_person_would_call_it(
    capsys: pytest.CaptureFixture[str], row: dict[str, object], prompt: str
) -> None:
    print_rows([{**row, "completion": "answer"}])
    assert lines_of(capsys)[1] == prompt


def test_tokens_from_journals_are_named_and_do_not_count_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(replace(RESULT, num_resumed_tokens=50_000))
    assert "completion tokens 200,000 (1,500/s, 50,000 of them from journals)" in lines_of(capsys)
