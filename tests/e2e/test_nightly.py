"""One command every night over a folder that grows: idempotent, so that a scheduler needs to know nothing."""

import json
from pathlib import Path

import pytest

from tests.jobs import command, job_values, model_without_weights, read_rows, write_input, write_job_file

pytestmark = pytest.mark.usefixtures("ray_session")


def test_each_night_generates_the_new_shards_alone(tmp_path: Path) -> None:
    """1. two shards  2. a third one came by day  3. nothing came."""
    model = model_without_weights(tmp_path / "model")
    values = job_values(model, tmp_path / "in", tmp_path / "out", engine={"kind": "fake"})
    job_file = write_job_file(tmp_path / "nightly.yaml", values)

    def night(*rows_per_shard: int) -> dict[str, object]:
        write_input(tmp_path / "in", rows_per_shard)
        ended = command("run", job_file, "--json", "--set", "execution.deadline=8h")
        result: dict[str, object] = json.loads(ended.stdout)
        assert ended.exit_code == result["exit_code"] == 0, ended.output
        return result

    def parts() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "completions").iterdir()}

    first = night(20, 20)
    assert (first["num_rows_committed_before"], first["num_completions"]) == (0, 40)
    kept = parts()
    second = night(20, 20, 10)
    assert (second["num_rows_committed_before"], second["num_completions"]) == (40, 10)
    assert kept.items() <= parts().items(), "a part of the night before was written again"
    before = parts()
    third = night(20, 20, 10)
    assert (third["run_id"], third["num_completions"], parts()) == ("", 0, before)
    assert [row[0] for row in read_rows(tmp_path / "out")] == list(range(50))
