"""The values of one part beyond its row ids: every column can be decoded and holds what an engine writes there."""

from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.audit.findings import Finding, RowMask, findings_of_rows
from batchinfer.audit.holdings import AuditedJob
from batchinfer.audit.opened_part import OpenedPart
from batchinfer.audit.unit_rows import Numbers, row_offsets
from batchinfer.records import (
    COMPLETION,
    FINISH_REASON,
    LOGPROBS,
    NUM_COMPLETION_TOKENS,
    NUM_PROMPT_TOKENS,
    ROW_ID,
    TOKEN_IDS,
    WorkUnit,
)

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
    for name in part.columns:
        if name == job.sampling_column:
            findings += _check_asked_samples(job, unit, part, rows, kept)
        else:
            # Decoding is the check: what was passed through is the input's own.
            part.column(name)
    return findings


def _check_asked_samples(
    job: AuditedJob, unit: WorkUnit, part: OpenedPart, rows: Numbers, kept: RowMask
) -> list[Finding]:
    """Rows whose number of samples is not the one their own sampling column asks for."""
    asked = part.column(str(job.sampling_column))
    numbers = np.full(len(kept), -1, np.int64)
    if pa.types.is_struct(asked.type) and asked.type.get_field_index("n") >= 0:
        numbers = _numbers(pc.struct_field(asked, "n"))
    numbers = np.where(numbers < 0, job.n, numbers)
    wanted = np.zeros(unit.num_rows, np.int64)
    wanted[rows] = numbers[kept]
    num_samples = np.bincount(rows, minlength=unit.num_rows)
    wrong = (num_samples > 0) & (num_samples != wanted)
    return findings_of_rows("wrong_samples", part.name, unit, wrong, f"{job.sampling_column}.n asks for another number")


def _lengths(lists: "pa.ChunkedArray[Any]") -> Numbers:
    return _numbers(pc.list_value_length(lists))


def _numbers(column: "pa.ChunkedArray[Any] | pa.Array[Any]") -> Numbers:
    """Integers, -1 for null."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return cast(pa.Int64Array, whole.cast(pa.int64())).fill_null(-1).to_numpy(zero_copy_only=False)


def _mask(flags: "pa.ChunkedArray[Any] | pa.Array[Any]") -> RowMask:
    whole = flags.combine_chunks() if isinstance(flags, pa.ChunkedArray) else flags
    return whole.to_numpy(zero_copy_only=False).astype(np.bool_)
