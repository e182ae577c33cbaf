"""The circuit breaker in whole jobs: poor completions stop the run, and the runs after it until somebody decides."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.errors import PoorQuality
from batchinfer.records import ROW_ID
from tests.jobs import fake_job, model_without_weights, read_rows, write_input

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS = 200


def test_poor_completions_stop_a_job_until_the_limit_is_raised(tmp_path: Path) -> None:
    """1. nearly everything is cut off: the run drains  2. so says the next one, at once  3. no limit: all is done.

    What the first run had committed and journaled is not generated again.
    """
    model = model_without_weights(tmp_path / "model")
    write_input(tmp_path / "in", [NUM_ROWS])

    def job(**quality: object) -> batchinfer.JobSpec:
        return fake_job(
            model, tmp_path / "in", tmp_path / "out",
            sampling={"max_new_tokens": 2, "ignore_eos": True}, engine={"fake": {"tokens_per_s": 200}}, quality=quality,
        )  # fmt: skip

    limited = job(max_truncated=0.3, min_rows=30)
    with pytest.raises(PoorQuality) as raised:
        batchinfer.run(limited)
    text = str(raised.value)
    assert "quality.max_truncated: " in text
    assert "rows are committed" in text
    committed = {row for (row,) in read_rows(tmp_path / "out", [ROW_ID])}
    assert 30 <= len(committed) < NUM_ROWS
    table = pq.read_table(tmp_path / "out" / "completions").to_pylist()
    truncated = {row["row_id"]: row["completion"] for row in table if row["finish_reason"] == "length"}
    named = [row_id for row_id in truncated if f"  {row_id}: " in text]
    assert len(named) == 3
    files = sorted((tmp_path / "out" / "_job").rglob("*"))

    with pytest.raises(PoorQuality, match=r"quality\.max_truncated") as again:
        batchinfer.run(limited)
    assert "rows are committed" not in str(again.value)
    assert sorted((tmp_path / "out" / "_job").rglob("*")) == files, "the second run has done something"

    result = batchinfer.run(job())
    assert (result.outcome, result.num_rows_committed_before) == ("complete", len(committed))
    assert result.quality["truncated"] == result.num_completions == NUM_ROWS - len(committed)
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete"
