"""What lies in an output, held against its plan: which parts are whose, and which are nobody's."""

from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.audit.findings import Finding
from batchinfer.errors import OutputError, ShardCorrupt
from batchinfer.records import Plan, WorkUnit
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.footer import key_values, read_footer
from batchinfer.storage.input_formats import ChosenFormat
from batchinfer.storage.layout import COMPLETIONS, ERRORS, read_job, read_plan, unit_id_of
from batchinfer.storage.location import Location


@dataclass(frozen=True, slots=True)
class AuditedJob:
    """What the parts are held against."""

    output: Location
    fingerprint: str
    #: Samples each row must have, unless its own ``sampling_column`` or request says otherwise.
    n: int
    sampling_column: str | None
    request_column: str | None = None
    #: ``input.format`` of the run that began the output.
    input_format: ChosenFormat = "parquet"


@dataclass(frozen=True, slots=True)
class Part:
    """A part's place and size. ``name`` is relative to the output."""

    location: Location
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CommittedUnit:
    """A unit of the plan that has a completions part."""

    unit: WorkUnit
    completions: Part
    errors: Part | None


@dataclass(frozen=True, slots=True)
class Holdings:
    """An output's parts by what they are. ``findings`` is what the listings alone show to be wrong."""

    job: AuditedJob
    plan: Plan
    committed: tuple[CommittedUnit, ...]
    #: Errors parts of planned units without a commit: what a crash right before one leaves.
    uncommitted_errors: tuple[Part, ...]
    findings: tuple[Finding, ...]

    @property
    def num_planned_units_committed(self) -> int:
        planned = {unit.unit_id for unit in self.plan.units}
        return sum(it.unit.unit_id in planned for it in self.committed)

    @property
    def num_rows(self) -> int:
        """Rows planned, and those of retired shards where they are committed."""
        planned = {unit.unit_id for unit in self.plan.units}
        return self.plan.num_rows + sum(it.unit.num_rows for it in self.committed if it.unit.unit_id not in planned)


def look_at(output_path: str, storage_options: StorageOptions | None) -> Holdings:
    """List an output and sort its parts.

    Raises OutputError when there is no job at ``output_path`` or its description is damaged, StorageUnavailable when
    the storage fails.
    """
    output = locate(output_path, storage_options)
    described = read_job(output)
    if described is None:
        raise OutputError(f"{output}: no batchinfer job there (no _job/job.json); check the path")
    plan = read_plan(output)
    if plan is None:
        raise OutputError(f"{output}: the job has no plan (no _job/plan.parquet); run the job again to write it")
    job = AuditedJob(
        output,
        str(described.get("fingerprint")),
        int(described.get("n", 1)),
        described.get("sampling_column"),
        described.get("request_column"),
        described.get("spec", {}).get("input", {}).get("format", "parquet"),
    )
    # Completions are listed first: while a run goes on, a committed unit's errors part is there before its commit.
    completions = _parts(output, COMPLETIONS)
    errors = _parts(output, ERRORS)
    planned = {unit.unit_id: unit for unit in plan.units}
    units = planned | {unit.unit_id: unit for shard in plan.retired for unit in shard.units}

    findings = [Finding("unreadable_shard", shard.path, shard.error) for shard in plan.unreadable]
    committed: list[CommittedUnit] = []
    for name, part in completions.items():
        unit_id = unit_id_of(name)
        if unit_id is not None and unit_id in units:
            committed.append(CommittedUnit(units[unit_id], part, errors.get(name)))
        else:
            findings.append(_unplanned(job, part, unit_id))
    uncommitted_errors: list[Part] = []
    for name, part in errors.items():
        if name in completions:
            continue
        unit_id = unit_id_of(name)
        if unit_id is not None and unit_id in units:
            uncommitted_errors.append(part)
        else:
            findings.append(_unplanned(job, part, unit_id))
    committed_ids = {it.unit.unit_id for it in committed}
    findings += [
        Finding("uncommitted_unit", unit_id, f"{unit.num_rows} rows; run the job again")
        for unit_id, unit in planned.items()
        if unit_id not in committed_ids
    ]
    return Holdings(job, plan, tuple(committed), tuple(uncommitted_errors), tuple(findings))


def _parts(output: Location, directory: str) -> Mapping[str, Part]:
    root = output.child(directory)
    return {
        file.name: Part(root.child(file.name), f"{directory}/{file.name}", file.size_bytes) for file in root.files()
    }


def _unplanned(job: AuditedJob, part: Part, unit_id: str | None) -> Finding:
    if unit_id is None:
        return Finding("foreign_part", part.name, "not the name of a part; move it out of the output")
    try:
        stated = key_values(read_footer(part.location, part.size_bytes)[1])
    except ShardCorrupt:
        stated = {}
    if stated.get("fingerprint") == job.fingerprint and stated.get("unit_id") == unit_id:
        return Finding(
            "superseded_part", part.name, "of a shard that has changed since; running the job again sets it aside"
        )
    return Finding("foreign_part", part.name, "not of this job's plan; move it out of the output")
