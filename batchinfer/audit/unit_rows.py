"""The rows of one committed unit: each there once, with all its samples, or a dead letter with its reason.

Which rows are dead letters is decided by the completions part: those it lacks and said it would lack when it was
written. The errors part is held against that, never the other way round.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.audit.findings import Finding, RowMask, findings_of_rows
from batchinfer.audit.holdings import AuditedJob, CommittedUnit
from batchinfer.audit.opened_part import OpenedPart
from batchinfer.errors import ShardCorrupt
from batchinfer.records import ROW_ID, SAMPLE, WorkUnit
from batchinfer.storage.dead_letters import errors_fit
from batchinfer.storage.layout import ERRORS
from batchinfer.storage.part_tables import ERROR_TYPE, DeadRows
from batchinfer.storage.writer import REASON_LOST

_NUM_ROWS_NAMED = 5

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class UnitAudit:
    """What one unit adds to the report."""

    num_rows_completed: int = 0
    num_completions: int = 0
    dead_letters_by_type: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Reasons:
    """Which rows an errors part names, and why; ``fits`` is what both labels say of it."""

    rows: Numbers
    error_types: list[str]
    fits: bool


def audit_rows(
    job: AuditedJob, it: CommittedUnit, completions: OpenedPart, errors: OpenedPart | ShardCorrupt | None
) -> UnitAudit:
    """Everything about the rows of one committed unit; ``errors`` is the damage where its footer cannot be read.

    Raises ShardCorrupt when row ids or samples of the completions part cannot be read.
    """
    unit, name = it.unit, completions.name
    findings = _identity(job, unit, completions)
    row_ids = completions.column_of_type(ROW_ID, pa.string())
    samples = completions.column_of_type(SAMPLE, pa.int32())
    rows, kept = row_offsets(unit, name, row_ids, findings)
    num_samples = _check_samples(job, unit, name, rows, _numbers(samples)[kept], findings)
    lacking: RowMask = num_samples == 0

    reasons = _reasons(job, it, completions, errors, findings)
    has_reason = np.zeros(unit.num_rows, np.bool_)
    by_type: Counter[str] = Counter()
    if reasons is not None:
        has_reason[reasons.rows] = True
        telling = lacking[reasons.rows]
        by_type.update(kind for kind, tells in zip(reasons.error_types, telling, strict=True) if tells)
        if reasons.fits:
            # Of an unfit one that is what makes it unfit.
            repeated = np.bincount(reasons.rows, minlength=unit.num_rows) > 1
            findings += findings_of_rows("duplicated_row", f"{ERRORS}/{name.partition('/')[2]}", unit, repeated)
            findings += findings_of_rows("row_in_both", name, unit, has_reason & ~lacking)
    unexplained = lacking & ~has_reason
    if completions.dead_rows == DeadRows.of(unit, np.flatnonzero(lacking)):
        by_type[REASON_LOST] += int(np.count_nonzero(unexplained))
        if reasons is None or reasons.fits:
            findings += findings_of_rows(
                "missing_reason",
                name,
                unit,
                unexplained,
                "no errors part names them; `batchinfer retry-failed` tries them",
            )
    elif unexplained.any():
        findings += findings_of_rows("missing_row", name, unit, unexplained)
    elif completions.dead_rows is not None and not any(finding.kind == "row_in_both" for finding in findings):
        stated = completions.dead_rows.number
        detail = f"its label counts {stated} dead letters, it lacks {np.count_nonzero(lacking)} rows"
        findings.append(Finding("wrong_count", name, detail))
    return UnitAudit(
        int(np.count_nonzero(num_samples)),
        int(num_samples.sum()),
        {kind: number for kind, number in by_type.items() if number},
        tuple(findings),
    )


def row_offsets(
    unit: WorkUnit, name: str, row_ids: "pa.ChunkedArray[Any]", findings: list[Finding]
) -> tuple[Numbers, RowMask]:
    """Offsets within the unit of those row ids that are its own, and which those are; others become a finding."""
    prefix = f"{unit.shard_id}:"
    ids = cast("pa.StringArray", row_ids.combine_chunks())
    matched = pc.match_substring_regex(ids, f"^{prefix}[0-9]{{1,18}}$").fill_null(False)
    own = matched.to_numpy(zero_copy_only=False).astype(np.bool_)
    digits = pc.utf8_slice_codeunits(ids, start=len(prefix)).filter(own)
    offsets = np.full(len(ids), -1, np.int64)
    offsets[own] = digits.cast(pa.int64()).to_numpy() - unit.first_row
    kept = own & (offsets >= 0) & (offsets < unit.num_rows)
    wrong = np.flatnonzero(~kept)
    if wrong.size:
        named = tuple(str(ids[int(index)].as_py()) for index in wrong)
        detail = f"{wrong.size} rows of other units, such as {', '.join(named[:_NUM_ROWS_NAMED])}"
        findings.append(Finding("wrong_row_id", name, detail, named))
    return offsets[kept], kept


def _identity(job: AuditedJob, unit: WorkUnit, part: OpenedPart) -> list[Finding]:
    findings = []
    fingerprint, unit_id = part.stated.get("fingerprint"), part.stated.get("unit_id")
    if fingerprint != job.fingerprint:
        detail = f"{fingerprint} in the part, {job.fingerprint} in job.json: of another job"
        findings.append(Finding("wrong_fingerprint", part.name, detail))
    if unit_id != unit.unit_id:
        findings.append(Finding("wrong_unit", part.name, f"its footer says {unit_id}"))
    return findings


def _reasons(
    job: AuditedJob,
    it: CommittedUnit,
    completions: OpenedPart,
    errors: OpenedPart | ShardCorrupt | None,
    findings: list[Finding],
) -> _Reasons | None:
    """What the errors part says; None when there is none, or nothing of it can be read."""
    if errors is None or it.errors is None:
        return None
    name = it.errors.name
    if isinstance(errors, ShardCorrupt):
        findings.append(Finding("unfit_errors_part", name, f"{errors}; run the job again, which writes it anew"))
        return _Reasons(np.zeros(0, np.int64), [], fits=False)
    # Where the completions part has lost its label, the errors part is taken at its word.
    fits = completions.dead_rows is None or errors_fit(completions.dead_rows, errors.dead_rows)
    if not fits:
        detail = "tells of other rows than the unit lacks: left by a crash or a race; run the job again, which mends it"
        findings.append(Finding("unfit_errors_part", name, detail))
    else:
        findings += _identity(job, it.unit, errors)
    try:
        row_ids = errors.column_of_type(ROW_ID, pa.string())
        error_types = errors.column_of_type(ERROR_TYPE, pa.string()).to_pylist()
    except ShardCorrupt as error:
        detail = f"{error}; delete it: its reasons are lost, no row is (`batchinfer retry-failed` tries them again)"
        findings.append(Finding("damaged_part", name, detail))
        return None
    ignored: list[Finding] = []
    rows, kept = row_offsets(it.unit, name, row_ids, findings if fits else ignored)
    return _Reasons(rows, [str(kind) for kind, own in zip(error_types, kept, strict=True) if own], fits)


def _numbers(samples: "pa.ChunkedArray[Any]") -> "np.ndarray[Any, Any]":
    """Sample numbers, -1 for null, which is no sample's number."""
    return cast(pa.Int32Array, samples.combine_chunks()).fill_null(-1).to_numpy()


def _check_samples(
    job: AuditedJob,
    unit: WorkUnit,
    name: str,
    rows: Numbers,
    samples: "np.ndarray[Any, Any]",
    findings: list[Finding],
) -> Numbers:
    """Distinct samples of each row of the unit; doubles and gaps become findings."""
    order = np.lexsort((samples, rows))
    rows, samples = rows[order], samples[order]
    repeated = np.zeros(len(rows), np.bool_)
    repeated[1:] = (rows[1:] == rows[:-1]) & (samples[1:] == samples[:-1])
    twice = np.bincount(rows[repeated], minlength=unit.num_rows) > 0
    findings += findings_of_rows("duplicated_row", name, unit, twice)

    rows, samples = rows[~repeated], samples[~repeated]
    num_samples = np.bincount(rows, minlength=unit.num_rows)
    first_of_row = np.cumsum(num_samples) - num_samples
    out_of_order = samples != np.arange(len(rows)) - first_of_row[rows]
    wrong = np.bincount(rows[out_of_order], minlength=unit.num_rows) > 0
    if job.sampling_column is None and job.request_column is None:
        wrong |= (num_samples > 0) & (num_samples != job.n)
    findings += findings_of_rows("wrong_samples", name, unit, wrong)
    return num_samples
