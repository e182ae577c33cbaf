"""``verify_deep``: every byte of every part and journal, and the input, against the plan."""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import chain

from batchinfer.audit.findings import Finding, VerifyReport
from batchinfer.audit.holdings import AuditedJob, CommittedUnit, Holdings, look_at
from batchinfer.audit.opened_part import OpenedPart, open_whole
from batchinfer.audit.surroundings import input_remarks, journal_remarks, leftover_remarks
from batchinfer.audit.unit_rows import UnitAudit, audit_rows
from batchinfer.audit.unit_values import audit_values
from batchinfer.audit.verify import damaged, in_parallel, opened_or_damaged, report_on
from batchinfer.errors import ShardCorrupt
from batchinfer.storage.filesystem import StorageOptions

#: Each holds a part whole and one of its columns decoded.
_AUDIT_THREADS = 4


def verify_deep(
    output_path: str,
    storage_options: StorageOptions | None = None,
    input_storage_options: StorageOptions | None = None,
) -> VerifyReport:
    """Audit an output by reading all of it: what :func:`verify` finds, and checksums, values and journals.

    The input (footers of Parquet, all of JSON Lines) is held against the plan where it can be reached; one that has
    moved or changed is a remark, since the output is what it is. Changes nothing; beside a live ``retry-failed`` it may
    find an errors part that does not fit yet. Raises OutputError when there is no job at ``output_path`` or its
    description is damaged, StorageUnavailable when the output's storage fails.
    """
    holdings = look_at(output_path, storage_options)
    audits = in_parallel(lambda it: _audit(holdings.job, it), holdings.committed, _AUDIT_THREADS)
    remarks = chain(
        leftover_remarks(holdings), journal_remarks(holdings), input_remarks(holdings, input_storage_options)
    )
    return report_on(holdings, audits, remarks, _num_bytes(holdings))


def _audit(job: AuditedJob, it: CommittedUnit) -> UnitAudit:
    try:
        with closing(open_whole(it.completions)) as completions:
            errors = opened_or_damaged(open_whole, it.errors)
            with closing(errors) if isinstance(errors, OpenedPart) else nullcontext():
                audit = audit_rows(job, it, completions, errors)
                findings = (*audit.findings, *_closer(job, it, completions, errors))
    except ShardCorrupt as error:
        return damaged(it.completions, error)
    return UnitAudit(audit.num_rows_completed, audit.num_completions, audit.dead_letters_by_type, findings)


def _closer(
    job: AuditedJob, it: CommittedUnit, completions: OpenedPart, errors: OpenedPart | ShardCorrupt | None
) -> Iterator[Finding]:
    """What row ids and samples alone do not show."""
    yield from audit_values(job, it.unit, completions)
    if isinstance(errors, OpenedPart):
        for name in errors.columns:
            try:
                errors.column(name)
            except ShardCorrupt as error:
                yield Finding("damaged_part", errors.name, str(error))


def _num_bytes(holdings: Holdings) -> int:
    return sum(it.completions.size_bytes + (it.errors.size_bytes if it.errors else 0) for it in holdings.committed)
