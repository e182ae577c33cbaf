"""What ``plan`` prints of a survey: the facts, and how sure they are."""

from dataclasses import replace

import pytest

from batchinfer.cli.plan_text import print_estimate, print_found, survey_progress
from batchinfer.spec import ExecutionSpec
from batchinfer.survey.estimate import Estimate, Workload
from batchinfer.survey.memory import Device, DeviceFit, MemoryFit
from batchinfer.survey.plan_survey import PlanSurvey
from batchinfer.survey.trial import Trial
from tests.unit.survey.test_estimate import PROBE, RUN
from tests.unit.survey.test_prompts import SURVEY

MEMORY = MemoryFit(
    "continuous",
    "bfloat16",
    15_600_000_000,
    131_072,
    (
        DeviceFit(Device("24 GiB GPU", "cuda", 24 << 30), 40_000, 1024, True),
        DeviceFit(Device("[B]", "cuda", 8 << 30, 2), 900, 1024, False),
    ),
)
ESTIMATE = Estimate(Workload(28_000, 95_000, 950, "max_new_tokens"), RUN, (36_000.0, 72_000.0), 4, 1.0, 2.0)
NOTHING = PlanSurvey(None, None, None, None, "no rows were looked at")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def printed(capsys: pytest.CaptureFixture[str], survey: PlanSurvey, **execution: float) -> list[str]:
    """The lines, with runs of spaces as one."""
    print_found(survey)
    print_estimate(survey, ExecutionSpec.model_validate(execution))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_sample_says_what_it_is_and_what_it_cannot_see(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(NOTHING, prompts=SURVEY))
    assert lines[0] == "prompts: a sample of 100 of 1,000 rows left, from 10 places in 4 shards"
    assert "tokens 29.5 ± 3 on average, 50 % up to 10, 90 % up to 20, 99 % up to 300, longest 300" in lines
    assert "in all about 28,000 prompt tokens, about 950 completions" in lines
    assert any("19 (20.0%, 6.8% of the tokens) repeat an earlier prompt, all of them greedy" in line for line in lines)
    assert any(line.endswith("--full counts all") for line in lines)
    assert "too_long: about 40 rows would be dead letters (4 in the sample)" in lines
    assert "row s:7: 9,000 prompt tokens" in lines
    assert "shard a.parquet: empty_prompt 1, too_long 3" in lines
    assert f"1 to 16 {'█' * 40} 50" in lines
    assert lines[-1] == "time: unknown: no rows were looked at"


def test_all_rows_are_counted_not_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(NOTHING, prompts=replace(SURVEY, num_rows=100, mean_length_error=None)))
    assert lines[0] == "prompts: all 100 rows left"
    assert not any("about" in line or "sample" in line for line in lines)


def test_memory_is_told_device_by_device(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(NOTHING, prompts=SURVEY, memory=MEMORY))
    (head,) = [line for line in lines if line.startswith("memory: ")]
    assert head == "memory: weights 15.6 GB in bfloat16, 131.1 kB of KV cache per token, continuous engine"
    # 29.5 prompt tokens and up to 100 new ones.
    assert "24 GiB GPU yes 40,000 308 100" in lines
    assert "2 × [B] no 900 6 2" in lines
    assert any("lower that where it does not" in line for line in lines)


def test_an_estimate_names_its_basis_and_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(NOTHING, estimate=ESTIMATE))
    assert lines[0] == (
        "time: at most 2h30m to 5h00m on 4 replicas, at most 10.00 to 20.00 GPU hours, at most 20.00 to 40.00 in all"
    )
    assert "speed of a run on H100, 2026-01-01: 50 tokens/s generated per replica" in lines
    assert any("as long as sampling.max_new_tokens allows" in line for line in lines)
    assert any("--probe measures it" in line for line in lines)


def test_a_job_that_may_use_less_than_it_takes_is_warned(capsys: pytest.CaptureFixture[str]) -> None:
    known = replace(ESTIMATE, work=replace(ESTIMATE.work, lengths="a run of this job"), num_replicas=None)
    lines = printed(capsys, replace(NOTHING, estimate=known), max_gpu_hours=5.0)
    assert "about 10h00m to 20h00m on one replica, whose number only the cluster knows" in lines[0]
    assert any("execution.max_gpu_hours 5 are less than that" in line for line in lines)
    assert not any(
        "max_gpu_hours" in line for line in printed(capsys, replace(NOTHING, estimate=known), max_gpu_hours=50.0)
    )


def test_a_probe_is_told_with_how_full_the_batch_was(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(NOTHING, trial=Trial(PROBE, 75.0, 64, 256)))
    assert lines[0] == (
        "probe: H100, continuous engine, loaded in 1m15s: 1,000 prompt tokens/s read, 100 tokens/s generated with 64 "
        "of 256 sequences at once"
    )


def test_progress_goes_to_stderr_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.cli.plan_text._LOG_INTERVAL_S", 0.0)
    with survey_progress() as show:
        show(1000, 3000)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "1,000 of 3,000 rows tokenised\n")
