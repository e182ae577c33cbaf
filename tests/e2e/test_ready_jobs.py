"""Ready job files of ``jobs/`` as they lie there, on their own small inputs, with the fake engine's words."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify_deep
from tests.jobs import command

pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).parents[2]


def run(name: str, model: Path, output: Path) -> list[dict[str, Any]]:
    """The rows that a ready job comes to."""
    overrides = [f"model.path={model}", "engine.kind=fake", "cluster.num_cpus=1", f"output.path={output}"]
    ended = command("run", f"jobs/{name}.yaml", *(part for each in overrides for part in ("--set", each)))
    assert ended.exit_code == 0, ended.output
    assert verify_deep(str(output)).findings == ()
    rows: list[dict[str, Any]] = pq.read_table(output / "completions").to_pylist()
    return rows


def test_texts_are_turned_into_other_texts_and_labels(
    tmp_path: Path, exaone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    notes = pq.read_table("jobs/texts").to_pylist()
    seeds = pq.read_table("jobs/seeds").to_pylist()
    assert len(notes) == len({note["text"] for note in notes}) >= 20
    assert {seed["language"] for seed in seeds} == {"en", "ko"}

    instructions = run("synthesis-instructions", exaone, tmp_path / "instructions")
    assert len(instructions) == 8 * len(seeds)
    assert {row["sample"] for row in instructions} == set(range(8))
    assert len({row["completion"] for row in instructions}) > 7 * len(seeds)
    assert {(row["id"], row["task"]) for row in instructions} == {(seed["id"], seed["task"]) for seed in seeds}

    for name in ("translate", "rewrite"):
        texts = run(name, exaone, tmp_path / name)
        assert {row["id"]: row["text"] for row in texts} == {note["id"]: note["text"] for note in notes}

    labels = run("label", exaone, tmp_path / "labels")
    assert len(labels) == pq.read_table("jobs/prompts").num_rows
    for row in labels:
        assert [score["choice"] for score in row["choices"]] == ["yes", "no"]
        assert row["completion"] in ("yes", "no")
        assert sum(score["probability"] for score in row["choices"]) == pytest.approx(1.0, abs=1e-5)
