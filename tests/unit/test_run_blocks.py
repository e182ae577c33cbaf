"""The job file's keys for watching quality and for ending a run in time: what they may be, what they do not change."""

from pathlib import Path

import pytest

from batchinfer.errors import SpecError
from batchinfer.fingerprint import fingerprint
from batchinfer.job_file import load_job, parse_job
from batchinfer.quality import QUALITY_KINDS
from batchinfer.spec import JobSpec
from batchinfer.telemetry import RunProgress, progress_line
from tests.jobs import job_values


def job(**blocks: dict[str, object]) -> JobSpec:
    return parse_job(job_values("model", "in", "out", **blocks))


def test_without_the_keys_nothing_is_limited() -> None:
    spec = job()
    assert (spec.quality.limits, spec.quality.scripts) == ({}, ())
    assert (spec.execution.deadline, spec.execution.max_gpu_hours) == (None, None)


def test_every_kind_has_its_limit() -> None:
    given = {f"max_{kind}": 0.25 for kind in QUALITY_KINDS}
    assert job(quality={**given, "script": ["kana", "han"]}).quality.limits == dict.fromkeys(QUALITY_KINDS, 0.25)


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        ({"script": "korean"}, "'hangul'"),
        ({"script": []}, "at least 1 item"),
        ({"max_empty": 1.5}, "at most 1"),
        ({"max_wrong_script": 0.1}, "give script, for example hangul"),
        ({"min_rows": 0}, "at least 1"),
        ({"max_emtpy": 0.1}, "did you mean 'max_empty'"),
    ],
)
def test_wrong_limits_are_told_with_a_way_out(quality: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(quality=quality)


@pytest.mark.parametrize("deadline", ["8 hours", "2026-11-24T06:00:00", "25:00"])
def test_a_deadline_that_means_nothing_is_refused(deadline: str) -> None:
    with pytest.raises(SpecError, match=r"execution\.deadline: expected a moment with its zone"):
        job(execution={"deadline": deadline})


@pytest.mark.parametrize("text", ["06:00", "2026-11-24T06:00:00+09:00", "8h"])
def test_a_deadline_needs_no_quotes(tmp_path: Path, text: str) -> None:
    """YAML 1.1 would read 06:00 as 360."""
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {path: m}\ninput: {path: in}\nprompt: {text: prompt}\noutput: {path: out}\n"
        f"execution:\n  deadline: {text}\n  max_gpu_hours: 40\n"
    )
    execution = load_job(file).execution
    assert (execution.deadline, execution.max_gpu_hours) == (text, 40.0)


def test_limits_change_no_row_and_so_no_fingerprint() -> None:
    limited = job(
        quality={"script": "hangul", "max_empty": 0.1, "min_rows": 7},
        execution={"deadline": "06:00", "max_gpu_hours": 3.0},
    )
    assert fingerprint(limited, {}) == fingerprint(job(), {})


def test_progress_tells_what_is_amiss_and_nothing_where_nothing_is() -> None:
    seen = RunProgress(num_completions=200, quality={"empty": 1, "wrong_script": 30})
    assert "15.0% wrong script, 0.5% empty" in progress_line(seen)
    assert "%" not in progress_line(RunProgress(num_completions=200))
