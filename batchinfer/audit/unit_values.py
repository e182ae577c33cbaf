"""The values of one part beyond its row ids: every column can be decoded and holds what an engine writes there."""

import json
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.audit.findings import Finding, RowMask, findings_of_rows
from batchinfer.audit.holdings import AuditedJob
from batchinfer.audit.opened_part import OpenedPart
from batchinfer.audit.unit_rows import Numbers, row_offsets
from batchinfer.records import (
    ANSWERS,
    CHOICES,
    COMPLETION,
    FINISH_REASON,
    LOGPROBS,
    NUM_COMPLETION_TOKENS,
    NUM_PROMPT_TOKENS,
    ROW_ID,
    TOKEN_IDS,
    WorkUnit,
)

#: How far probabilities may add up beside 1: they are float32.
_SHARE_ERROR = 1e-4
_FINISH_REASONS = pa.array(["stop", "length"])


def audit_values(job: AuditedJob, unit: WorkUnit, part: OpenedPart) -> list[Finding]:
    """Findings about a completions part whose row ids have been audited already; one column in memory at a time.

    Raises ShardCorrupt when a column cannot be decoded or a generated one is missing.
    """
    findings: list[Finding] = []
    rows, kept = row_offsets(unit, part.name, part.column_of_type(ROW_ID, pa.string()), [])

    def report(column: str, wrong: RowMask) -> None:
        marked = np.bincount(rows[wrong[kept]], minlength=unit.num_rows) > 0
        findings.extend(findings_of_rows("wrong_value", part.name, unit, marked, f"in column {column}"))

    num_tokens = _numbers(part.column_of_type(NUM_COMPLETION_TOKENS, pa.int32()))
    report(NUM_COMPLETION_TOKENS, num_tokens < 0)
    report(NUM_PROMPT_TOKENS, _numbers(part.column_of_type(NUM_PROMPT_TOKENS, pa.int32())) < 0)
    report(COMPLETION, _mask(part.column_of_type(COMPLETION, pa.string()).is_null()))
    known = pc.is_in(part.column_of_type(FINISH_REASON, pa.string()), value_set=_FINISH_REASONS)
    report(FINISH_REASON, ~_mask(known))
    if TOKEN_IDS in part.columns:
        report(TOKEN_IDS, _lengths(part.column(TOKEN_IDS)) != num_tokens)
    if LOGPROBS in part.columns:
        lengths = _lengths(part.column(LOGPROBS))
        # Null are those of a row that asked for none.
        report(LOGPROBS, (lengths >= 0) & (lengths != num_tokens))
    if CHOICES in part.columns and _is_list_with(part.column(CHOICES), "probability"):
        report(CHOICES, _wrong_choices(part.column(CHOICES), part.column_of_type(COMPLETION, pa.string())))
    if ANSWERS in part.columns and _is_list_with(part.column(ANSWERS), NUM_COMPLETION_TOKENS):
        report(ANSWERS, _wrong_answers(part.column(ANSWERS), part.column_of_type(COMPLETION, pa.string()), num_tokens))
    for name in part.columns:
        if name in (job.sampling_column, job.request_column):
            findings += _check_asked_samples(job, name, unit, part, rows, kept)
        else:
            # Decoding is the check: what was passed through is the input's own.
            part.column(name)
    return findings


def _is_list_with(column: "pa.ChunkedArray[Any]", field: str) -> bool:
    """Whether it is the job's own list of structs: a column of that name that was passed through is the input's."""
    kind = column.type
    fields = kind.value_type if isinstance(kind, pa.ListType) else None
    return isinstance(fields, pa.StructType) and fields.get_field_index(field) >= 0


def _wrong_answers(
    answers: "pa.ChunkedArray[Any]", completions: "pa.ChunkedArray[Any]", num_tokens: Numbers
) -> RowMask:
    """Rows whose last answer is not the completion, or whose answers have other tokens than it counts."""
    lists = cast("pa.ListArray[Any]", answers.combine_chunks())
    starts, items = lists.offsets.to_numpy(), cast(pa.StructArray, lists.values)
    totals = np.concatenate([[0], np.cumsum(_numbers(items.field(NUM_COMPLETION_TOKENS)))])
    wrong = (starts[1:] == starts[:-1]) | (totals[starts[1:]] - totals[starts[:-1]] != num_tokens)
    last = items.field(COMPLETION).take(pa.array(np.maximum(starts[1:] - 1, 0))) if len(items) else None
    same = np.zeros(len(lists), np.bool_) if last is None else _mask(pc.equal(last, completions.combine_chunks()))
    return cast(RowMask, wrong | ~same)


def _wrong_choices(choices: "pa.ChunkedArray[Any]", completions: "pa.ChunkedArray[Any]") -> RowMask:
    """Rows whose choices' probabilities do not add up to 1, or the likeliest of which is not the completion."""
    lists = cast("pa.ListArray[Any]", choices.combine_chunks())
    starts, items = lists.offsets.to_numpy(), cast(pa.StructArray, lists.values)
    logprobs = items.field("logprob").to_numpy(zero_copy_only=False)
    shares = items.field("probability").to_numpy(zero_copy_only=False).astype(np.float64)
    texts = items.field("choice").to_pylist()
    wrong = np.zeros(len(lists), np.bool_)
    for row, (is_valid, completion) in enumerate(
        zip(lists.is_valid().to_pylist(), completions.to_pylist(), strict=True)
    ):
        first, last = int(starts[row]), int(starts[row + 1])
        if is_valid:
            wrong[row] = first == last or (
                texts[first + int(np.argmax(logprobs[first:last]))] != completion
                or not abs(float(shares[first:last].sum()) - 1.0) < _SHARE_ERROR
            )
    return wrong


def _check_asked_samples(
    job: AuditedJob, column: str, unit: WorkUnit, part: OpenedPart, rows: Numbers, kept: RowMask
) -> list[Finding]:
    """Rows whose number of samples is not the one that their own sampling struct, or their request, asks for."""
    asked = part.column(column)
    numbers = np.full(len(kept), -1, np.int64)
    if pa.types.is_struct(asked.type) and asked.type.get_field_index("n") >= 0:
        numbers = _numbers(pc.struct_field(asked, "n"))
    elif column == job.request_column:
        numbers = np.array([_asked_by(body) for body in asked.to_pylist()], np.int64)
    numbers = np.where(numbers < 0, job.n, numbers)
    wanted = np.zeros(unit.num_rows, np.int64)
    wanted[rows] = numbers[kept]
    num_samples = np.bincount(rows, minlength=unit.num_rows)
    wrong = (num_samples > 0) & (num_samples != wanted)
    return findings_of_rows("wrong_samples", part.name, unit, wrong, f"{column}.n asks for another number")


def _asked_by(body: object) -> int:
    """Samples that a completed row's request asks for; -1 = it does not say."""
    try:
        asked = json.loads(body).get("n") if isinstance(body, str) else None
    except (ValueError, AttributeError):
        return -1
    return asked if isinstance(asked, int) else -1


def _lengths(lists: "pa.ChunkedArray[Any]") -> Numbers:
    return _numbers(pc.list_value_length(lists))


def _numbers(column: "pa.ChunkedArray[Any] | pa.Array[Any]") -> Numbers:
    """Integers, -1 for null."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return cast(pa.Int64Array, whole.cast(pa.int64())).fill_null(-1).to_numpy(zero_copy_only=False)


def _mask(flags: "pa.ChunkedArray[Any] | pa.Array[Any]") -> RowMask:
    whole = flags.combine_chunks() if isinstance(flags, pa.ChunkedArray) else flags
    return whole.to_numpy(zero_copy_only=False).astype(np.bool_)
