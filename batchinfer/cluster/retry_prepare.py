"""What a retry of dead letters is about: which job it may be, which units it touches, what it notes down."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from batchinfer.cluster.messages import RetryScope
from batchinfer.cluster.prepare import JobFacts, Preparation, Retry, look_at_job
from batchinfer.errors import FingerprintMismatch, OutputError
from batchinfer.fingerprint import Fingerprint, diff
from batchinfer.planner import check_output_apart
from batchinfer.records import Plan, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.dead_letters import dead_letters_of_every_unit, in_parallel, look_at_dead_letters
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import (
    COMPLETIONS,
    ERRORS,
    check_usable,
    errors_part,
    parse_unit_id,
    parts,
    read_job,
    read_plan,
    write_job,
)
from batchinfer.storage.location import Location
from batchinfer.storage.writer import REASON_LOST, read_reasons

logger = logging.getLogger(__name__)

#: Limits: they decide whether a row can be generated and how far, not what it says. Whatever else a fingerprint holds
#: would make rows of one output mean two things.
MAY_CHANGE = frozenset({"sampling.max_new_tokens", "model.max_model_len"})


def prepare_retry(spec: JobSpec, error_types: Sequence[str] = (), policy: RetryPolicy | None = None) -> Preparation:
    """Hold a job against an output's dead letters; units to do are committed ones that have some. Writes nothing.

    ``error_types``: only dead letters of these types, all when empty.

    Raises:
        FingerprintMismatch: the job differs from the output's in more than limits; lists what.
        JobError: job file, model, input or output are wrong, or there is no output yet.
        StorageUnavailable: input or output cannot be reached just now.
    """
    check_output_apart(spec.input.paths, spec.output.path)
    output = locate(spec.output.path, spec.output.storage_options, policy=policy)
    check_usable(output)
    return look_at_output(look_at_job(spec, policy), output, tuple(error_types))


def look_at_output(facts: JobFacts, output: Location, error_types: tuple[str, ...]) -> Preparation:
    """Hold a job against the dead letters that its output has at this moment; raises as :func:`prepare_retry`."""
    job, plan = read_job(output), read_plan(output)
    if job is None or plan is None:
        raise OutputError(f"{output}: no batchinfer job there, so no dead letters; `batchinfer run` comes first")
    theirs = Fingerprint(str(job.get("fingerprint")), _texts(job.get("fingerprint_parts")))
    changed = _changed_limits(theirs, facts.fingerprint, output)

    committed = parts(output, COMPLETIONS)
    counts = dead_letters_of_every_unit(output, committed)
    unfit = look_at_dead_letters(output, committed, parts(output, ERRORS)).unfit
    plan = _as_the_input_is(plan, facts)
    here = {shard.shard_id for shard in facts.input.plan.shards}
    failed = [unit for unit in plan.units if unit.unit_id in counts and unit.shard_id in here]
    matches = in_parallel(lambda unit: _has_type(output, unit, error_types), failed)
    wanted = [unit for unit, matched in zip(failed, matches, strict=True) if matched]
    chosen = {unit.unit_id for unit in wanted}
    _tell_of_others(counts, here)
    others = [unit for unit in plan.units if unit.unit_id in committed and unit.unit_id not in chosen]
    return Preparation(
        facts=facts,
        output=output,
        plan=plan,
        plan_changed=False,
        is_new=False,
        superseded=(),
        pending=tuple(wanted),
        num_units_committed=len(others),
        num_rows_committed=sum(unit.num_rows for unit in others),
        num_dead_letters=sum(number for unit_id, number in counts.items() if unit_id not in chosen),
        unfit_errors=tuple(found for name in unfit if (found := parse_unit_id(name)) is not None),
        retry=Retry(
            scope=RetryScope(error_types, _journal_fingerprint(facts)),
            fingerprint=theirs,
            changed=changed,
            num_dead_letters=sum(counts[unit_id] for unit_id in chosen),
            uncommitted=tuple(unit for unit in plan.units if unit.unit_id not in committed),
        ),
    )


def note_retry(preparation: Preparation, run_id: str) -> None:
    """Add the retry to job.json: rows of one output may have been made under several limits, and it says which.

    Before the first row is published, so that no row's limits go unnoted; a crash right behind it leaves a note of a
    retry that changed nothing.
    """
    job, retry = read_job(preparation.output), preparation.retry
    if job is None or retry is None:
        raise OutputError(f"{preparation.output}: its job.json has gone since; restore it")
    note = {
        "run": run_id,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "changed": {name: list(values) for name, values in retry.changed.items()},
        "error_types": list(retry.scope.error_types),
        "num_units": len(preparation.pending),
        "num_dead_letters": retry.num_dead_letters,
    }
    write_job(preparation.output, {**job, "retries": [*job.get("retries", []), note]})


def _journal_fingerprint(facts: JobFacts) -> str:
    """Of the retry alone: a run's journal that a crash left calls the very rows dead that are to be tried.

    And of its limits: a sequence that ended at another one has not ended.
    """
    return f"retry-{facts.fingerprint.digest}"


def _changed_limits(theirs: Fingerprint, ours: Fingerprint, output: Location) -> dict[str, tuple[str, str]]:
    names = {*theirs.parts, *ours.parts}
    changed = {name for name in names if theirs.parts.get(name) != ours.parts.get(name)}
    if changed - MAY_CHANGE:
        kept = {name: value for name, value in ours.parts.items() if name in MAY_CHANGE}
        differences = "\n".join(f"  {line}" for line in diff({**theirs.parts, **kept}, ours.parts))
        raise FingerprintMismatch(
            f"{output} was made by a job that generates something else:\n{differences}\n"
            f"Change it back: a retry may have another {' and '.join(sorted(MAY_CHANGE))}, and other values in engine, "
            "cluster and execution."
        )
    return {name: (theirs.parts.get(name, ""), ours.parts.get(name, "")) for name in sorted(changed)}


def _as_the_input_is(plan: Plan, facts: JobFacts) -> Plan:
    """The output's plan with its shards where the input has them now; new shards are ``run``'s business."""
    now = {shard.shard_id: shard for shard in facts.input.plan.shards}
    shards = tuple(
        replace(now[shard.shard_id], rows_per_unit=shard.rows_per_unit) if shard.shard_id in now else shard
        for shard in plan.shards
    )
    return replace(plan, shards=shards)


def _has_type(output: Location, unit: WorkUnit, error_types: tuple[str, ...]) -> bool:
    if not error_types:
        return True
    reasons = read_reasons(errors_part(output, unit.unit_id)).values()
    return REASON_LOST in error_types or any(error.error_type in error_types for error in reasons)


def _tell_of_others(counts: Mapping[str, int], here: set[str]) -> None:
    gone = {unit_id: number for unit_id, number in counts.items() if unit_id.partition("-")[0] not in here}
    if gone:
        logger.warning(
            "%d dead letters of %d units cannot be tried: their shards are not in the input any more, or have changed",
            sum(gone.values()),
            len(gone),
        )


def _texts(values: object) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, dict) else {}
