"""A row whose generation kills the process: it becomes a dead letter, and its neighbours are generated all the same."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer.models.tokenizer import load_tokenizer
from tests.jobs import fake_job, prompts, read_dead_letters, read_rows

POISON = "☠"


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_kills_its_replica_is_found_and_left_out(tmp_path: Path, exaone: Path) -> None:
    """1. the unit kills its replica  2. parts of it are probed  3. one row kills twice alone  4. the rest commits"""
    texts = prompts(3)
    tokenize = load_tokenizer(exaone)
    poison_ids = set(tokenize(POISON)["input_ids"]) - set(tokenize(" ".join(texts))["input_ids"])
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(4), "prompt": [*texts[:2], POISON, texts[2]]})
    pq.write_table(table, tmp_path / "in" / "rows.parquet")
    batchinfer.run(fake_job(exaone, tmp_path / "in", tmp_path / "quiet"))

    spec = fake_job(exaone, tmp_path / "in", tmp_path / "out", engine={"fake": {"poison_token_id": min(poison_ids)}})
    result = batchinfer.run(spec)
    assert (result.exit_code, result.num_dead_letters, result.given_up) == (1, 1, ())
    # What the search costs is not what this is about; that it is found by two deaths alone, is.
    assert 3 <= result.num_replicas_died <= 4
    assert [error_type for _, error_type in read_dead_letters(tmp_path / "out")] == ["killed_replica"]
    assert read_rows(tmp_path / "out") == [row for row in read_rows(tmp_path / "quiet") if row[0] != 2]
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete_with_dead_letters"
