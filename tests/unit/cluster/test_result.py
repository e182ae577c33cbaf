"""What a run came to, and the exit code it ends with."""

import json
from dataclasses import replace

import pytest

from batchinfer.cluster.result import GivenUpUnit, JobResult

COMPLETE = JobResult(
    run_id="run",
    output="out",
    fingerprint="f" * 16,
    num_rows=20,
    num_rows_committed=20,
    num_rows_committed_before=5,
    num_units=2,
    num_units_committed=2,
    num_dead_letters=0,
    num_completions=15,
    num_prompt_tokens=100,
    num_completion_tokens=200,
    elapsed_s=2.0,
    generation_s=1.0,
)
GIVEN_UP = GivenUpUnit("unit", "a.parquet", 3, "StorageUnavailable: 503")


@pytest.mark.parametrize(
    ("result", "outcome", "exit_code"),
    [
        (COMPLETE, "complete", 0),
        (replace(COMPLETE, num_dead_letters=1), "dead_letters", 1),
        (replace(COMPLETE, unreadable_shards=("bad.parquet",)), "dead_letters", 1),
        (replace(COMPLETE, num_units_committed=1, given_up=(GIVEN_UP,)), "unfinished", 3),
        (replace(COMPLETE, num_units_committed=1, num_dead_letters=1), "unfinished", 3),
        (replace(COMPLETE, num_units=0, num_units_committed=0, num_rows=0), "complete", 0),
    ],
    ids=["complete", "dead-letters", "unreadable-shard", "given-up", "both", "empty"],
)
def test_the_outcome_follows_from_the_counts(result: JobResult, outcome: str, exit_code: int) -> None:
    assert result.outcome == outcome
    assert result.exit_code == exit_code


def test_as_json_is_plain_values_with_outcome_and_exit_code() -> None:
    written = json.loads(json.dumps(replace(COMPLETE, num_units_committed=1, given_up=(GIVEN_UP,)).as_json()))
    assert written["outcome"] == "unfinished"
    assert written["exit_code"] == 3
    assert written["given_up"] == [
        {"unit_id": "unit", "shard": "a.parquet", "num_attempts": 3, "error": "StorageUnavailable: 503"}
    ]
    assert written["num_rows"] == 20
