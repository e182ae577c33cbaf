"""``verify``: footers and two columns of every part, enough to prove that each planned row is there once."""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext

from batchinfer.audit.findings import Finding, Remark, VerifyReport, verdict_of
from batchinfer.audit.holdings import AuditedJob, CommittedUnit, Holdings, Part, look_at
from batchinfer.audit.opened_part import OpenedPart, open_ranged
from batchinfer.audit.unit_rows import UnitAudit, audit_rows
from batchinfer.errors import ShardCorrupt
from batchinfer.storage.filesystem import StorageOptions
from batchinfer.storage.layout import ERRORS

_AUDIT_THREADS = 8


def verify(output_path: str, storage_options: StorageOptions | None = None) -> VerifyReport:
    """Audit an output. Changes nothing, needs neither the input nor the model, may run beside a live run.

    Raises OutputError when there is no job at ``output_path``, StorageUnavailable when the storage fails.
    """
    holdings = look_at(output_path, storage_options)
    audits = in_parallel(lambda it: _audit(holdings.job, it), holdings.committed, _AUDIT_THREADS)
    return report_on(holdings, audits)


def in_parallel(
    audit: Callable[[CommittedUnit], UnitAudit], units: Iterable[CommittedUnit], num_threads: int
) -> Iterable[UnitAudit]:
    """The audits of units in order; parts are forgotten as they are done."""
    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="audit") as pool:
        yield from pool.map(audit, units)


def report_on(
    holdings: Holdings, audits: Iterable[UnitAudit], remarks: Iterable[Remark] = (), num_bytes_checked: int = 0
) -> VerifyReport:
    """What the listings and the units' audits come to."""
    findings = list(holdings.findings)
    num_rows_completed = num_completions = 0
    dead_letters: Counter[str] = Counter()
    for audit in audits:
        num_rows_completed += audit.num_rows_completed
        num_completions += audit.num_completions
        dead_letters.update(audit.dead_letters_by_type)
        findings += audit.findings
    return VerifyReport(
        verdict=verdict_of(findings, dead_letters.total()),
        output=str(holdings.job.output),
        num_shards=len(holdings.plan.shards),
        num_units=len(holdings.plan.units),
        num_units_committed=holdings.num_planned_units_committed,
        num_rows=holdings.num_rows,
        num_rows_completed=num_rows_completed,
        num_completions=num_completions,
        num_dead_letters=dead_letters.total(),
        dead_letters_by_type=dict(dead_letters.most_common()),
        findings=tuple(findings),
        remarks=tuple(remarks),
        num_bytes_checked=num_bytes_checked,
    )


def damaged(part: Part, error: ShardCorrupt) -> UnitAudit:
    """The audit of a unit whose completions part cannot be read."""
    detail = f"{error}; delete it (and {ERRORS}/ of that unit) and run the job again"
    return UnitAudit(findings=(Finding("damaged_part", part.name, detail),))


def opened_or_damaged(open_part: Callable[[Part], OpenedPart], part: Part | None) -> OpenedPart | ShardCorrupt | None:
    """An errors part, the damage of its footer, or None where there is none."""
    try:
        return open_part(part) if part is not None else None
    except ShardCorrupt as error:
        return error


def _audit(job: AuditedJob, it: CommittedUnit) -> UnitAudit:
    try:
        with closing(open_ranged(it.completions)) as completions:
            errors = opened_or_damaged(open_ranged, it.errors)
            with closing(errors) if isinstance(errors, OpenedPart) else nullcontext():
                return audit_rows(job, it, completions, errors)
    except ShardCorrupt as error:
        return damaged(it.completions, error)
