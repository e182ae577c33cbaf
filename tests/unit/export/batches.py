"""Outputs of API requests for tests: a shard of requests, and parts as a run of ``prompt.request`` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.records import Completion, Plan, RowError, TokenLogprobs
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import write_job, write_plan
from batchinfer.storage.location import Location
from batchinfer.storage.writer import PartFormat, publish_unit
from tests.outputs import FINGERPRINT, planned

CHAT = {"model": "my-model", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "my-model", "prompt": "Once"}
CREATED_AT = "2026-01-02T03:04:05+00:00"
CREATED_S = 1767323045


def described(request_column: str | None = "body", **spec: Any) -> dict[str, Any]:
    """job.json as far as an export reads it."""
    return {
        "name": "test",
        "fingerprint": FINGERPRINT,
        "created_at": CREATED_AT,
        "n": 1,
        "sampling_column": None,
        "request_column": request_column,
        "spec": {"model": {"path": "org/Some-Model", "revision": None}, "prompt": {"request": request_column}, **spec},
    }


def line(custom_id: str, body: object, url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": json.dumps(body)}


def write_output(
    tmp_path: Path,
    rows: Sequence[Mapping[str, Any]],
    made: Mapping[int, Sequence[Completion] | RowError],
    *,
    columns: Sequence[str] = ("custom_id", "method", "url", "body"),
    rows_per_unit: int = 2,
    job: Mapping[str, Any] | None = None,
    answers: bool = False,
) -> tuple[Location, Plan]:
    """An output over these rows. ``made`` has the outcome of each row by number, row ids left to be filled in; units
    with a row that has none are not committed."""
    source = tmp_path / "in" / "requests.parquet"
    source.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(row) for row in rows])
    pq.write_table(table, source)
    plan = planned(source.parent, rows_per_unit)
    output = locate(str(tmp_path / "out"))
    write_plan(output, plan)
    write_job(output, dict(job or described()))
    part = PartFormat(fingerprint=FINGERPRINT, run_id="run-1", columns=tuple(columns), logprobs=True, answers=answers)
    for unit in plan.units:
        numbers = range(unit.first_row, unit.first_row + unit.num_rows)
        if not all(number in made for number in numbers):
            continue
        completions: list[Completion] = []
        errors: list[RowError] = []
        for number in numbers:
            outcome, row_id = made[number], unit.row_id(number - unit.first_row)
            if isinstance(outcome, RowError):
                errors.append(RowError(row_id, outcome.error_type, outcome.error))
            else:
                completions += [replaced(completion, row_id) for completion in outcome]
        publish_unit(output, unit, table.slice(unit.first_row, unit.num_rows), completions, errors, part)
    return output, plan


def replaced(completion: Completion, row_id: str) -> Completion:
    return Completion(
        row_id, completion.sample, completion.text, completion.token_ids, completion.finish_reason,
        completion.num_prompt_tokens, completion.logprobs, completion.choices, completion.answers,
    )  # fmt: skip


def said(*texts: str, logprobs: Sequence[TokenLogprobs] | None = None) -> list[Completion]:
    """One sample per text."""
    return [
        Completion("", sample, text, (1, 2, 3), "stop", 5, None if logprobs is None else tuple(logprobs))
        for sample, text in enumerate(texts)
    ]


def failed(error_type: str, error: str) -> RowError:
    return RowError("", error_type, error)
