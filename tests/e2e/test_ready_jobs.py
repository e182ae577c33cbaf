"""Every job file of ``jobs/`` as it lies there, on its own small input, with the fake engine's words.

Driver and replica are threads of this process, so each takes a second. What a job is for is looked at where it says
more than that every row was answered; those of ``jobs/bench`` have a test file of their own.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify_deep
from batchinfer.job_file import load_job
from tests.faults.in_process import one_machine, run_quietly
from tests.jobs import model_without_weights

ROOT = Path(__file__).parents[2]
#: With grammars, which the fake engine cannot hold: test_structured_job.py runs it with a tiny model.
NEEDS_A_MODEL = {"extract-json"}
NAMES = sorted({path.stem for path in (ROOT / "jobs").glob("*.yaml")} - NEEDS_A_MODEL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The longest completions asked for are of 30,000 tokens.
    return model_without_weights(tmp_path_factory.mktemp("model"), limit=65_536)


def run(name: str, model: Path, output: Path) -> list[dict[str, Any]]:
    """The rows that a ready job comes to."""
    overrides = {"model.path": model, "output.path": output, "engine.kind": "fake", "sampling.max_new_tokens": 64}
    spec = load_job(ROOT / "jobs" / f"{name}.yaml", [f"{key}={value}" for key, value in overrides.items()])
    with one_machine():
        result, _ = run_quietly(spec)
    assert result.outcome == "complete"
    assert verify_deep(str(output)).findings == ()
    rows: list[dict[str, Any]] = pq.read_table(output / "completions").to_pylist()
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_job_answers_all_of_its_input(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rows = run(name, model, tmp_path / "out")
    if name == "synthesis-instructions":
        seeds = pq.read_table("jobs/seeds").to_pylist()
        assert len(rows) == 8 * len(seeds)
        assert {row["sample"] for row in rows} == set(range(8))
        assert len({row["completion"] for row in rows}) > 7 * len(seeds)
        assert {(row["id"], row["task"]) for row in rows} == {(seed["id"], seed["task"]) for seed in seeds}
    elif name in ("translate", "rewrite"):
        notes = pq.read_table("jobs/texts").to_pylist()
        assert {row["id"]: row["text"] for row in rows} == {note["id"]: note["text"] for note in notes}
    elif name == "label":
        assert len(rows) == pq.read_table("jobs/prompts").num_rows
        for row in rows:
            assert [score["choice"] for score in row["choices"]] == ["yes", "no"]
            assert row["completion"] in ("yes", "no")
            assert sum(score["probability"] for score in row["choices"]) == pytest.approx(1.0, abs=1e-5)
    else:
        assert rows
        assert all(row["completion"] for row in rows)


def test_the_other_files_are_run_elsewhere() -> None:
    structured = (ROOT / "tests/e2e/test_structured_job.py").read_text()
    assert [name for name in NEEDS_A_MODEL if f'"jobs/{name}.yaml"' not in structured] == []
    bench = (ROOT / "tests/e2e/test_bench_jobs.py").read_text()
    assert [path.stem for path in (ROOT / "jobs/bench").glob("*.yaml") if f'"{path.stem}"' not in bench] == []
