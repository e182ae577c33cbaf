"""What lies where in an output directory, and the formats of the files that are not row parts.

::

    completions/part-<unit id>.parquet   one committed unit each: the part's existence is the commit
    errors/part-<unit id>.parquet        why rows are missing in the completions part, which alone says that they are
    _job/job.json                        resolved job, fingerprint, versions, retries of dead letters
    _job/plan.parquet                    shards, from which the units follow
    _job/lease.json                      which run holds the output
    _job/journal/<unit id>/*.arrow       what a unit in flight has generated so far (``journal``)
    _job/runs/<run id>.jsonl             events of a run (object stores: <run id>-<k>.jsonl)
    _job/superseded/{completions,errors}/  parts of shards that the input holds no longer in that form
    _job/chaos/                          what `run --chaos` has killed (see ``chaos_faults``)
    _job/tmp/                            bytes on their way to their name; local outputs only

Every function takes the output directory as a Location.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import OutputError
from batchinfer.records import FORMAT_VERSION, Plan, Shard, UnreadableShard, WorkUnit
from batchinfer.redact import redact
from batchinfer.storage import checksums
from batchinfer.storage.location import FoundFile, Location

COMPLETIONS: Final = "completions"
ERRORS: Final = "errors"
JOB: Final = "_job"
JOURNAL: Final = f"{JOB}/journal"
RUNS: Final = f"{JOB}/runs"
SUPERSEDED: Final = f"{JOB}/superseded"

_JOB_FILE: Final = f"{JOB}/job.json"
_PLAN_FILE: Final = f"{JOB}/plan.parquet"
_LEASE_FILE: Final = f"{JOB}/lease.json"
_STAGING: Final = f"{JOB}/tmp"

#: The one spelling of a unit id; a name that reads alike but differs in a digit's padding is not one.
_UNIT_ID = re.compile(r"(?P<shard>[0-9a-f]{16})-(?P<first>\d{9,})-(?P<rows>[1-9]\d*)")

_PLAN_FIELDS: "Final[list[pa.Field[Any]]]" = [
    pa.field("state", pa.string(), nullable=False),  # present | unreadable | retired
    pa.field("shard_id", pa.string()),  # null when unreadable, as num_rows and rows_per_unit are
    pa.field("path", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),  # without credentials
    pa.field("num_rows", pa.int64()),
    pa.field("size_bytes", pa.int64(), nullable=False),
    pa.field("rows_per_unit", pa.int64()),
    pa.field("error", pa.string()),
]
_PLAN_SCHEMA = pa.schema(_PLAN_FIELDS, metadata={"batchinfer.format_version": str(FORMAT_VERSION)})


def part_name(unit_id: str) -> str:
    """File name of a unit's part, the same in completions/ and errors/."""
    if parse_unit_id(unit_id) is None:
        raise OutputError(f"{unit_id!r} is no unit id; part names are made of unit ids alone")
    return f"part-{unit_id}.parquet"


def unit_id_of(name: str) -> str | None:
    """The unit id a part's file name spells, or None when it is no part name."""
    if not name.startswith("part-") or not name.endswith(".parquet"):
        return None
    unit_id = name.removeprefix("part-").removesuffix(".parquet")
    return unit_id if parse_unit_id(unit_id) is not None else None


def parse_unit_id(unit_id: str) -> WorkUnit | None:
    """The unit an id stands for, or None when it is not written exactly as ``WorkUnit.unit_id`` writes it."""
    match = _UNIT_ID.fullmatch(unit_id)
    if match is None:
        return None
    unit = WorkUnit(match["shard"], int(match["first"]), int(match["rows"]))
    return unit if unit.unit_id == unit_id else None


def completions_part(output: Location, unit_id: str) -> Location:
    """Where the unit's completions are, or will be."""
    return output.child(f"{COMPLETIONS}/{part_name(unit_id)}")


def errors_part(output: Location, unit_id: str) -> Location:
    """Where the unit's dead letters are, if it has any."""
    return output.child(f"{ERRORS}/{part_name(unit_id)}")


def journal_directory(output: Location, unit_id: str) -> Location:
    """Where the segments of the unit's journal are, while it has one."""
    if parse_unit_id(unit_id) is None:
        raise OutputError(f"{unit_id!r} is no unit id; journals are named by unit ids alone")
    return output.child(f"{JOURNAL}/{unit_id}")


def staging(output: Location) -> Location:
    """Where local writes are prepared: same filesystem, outside completions/."""
    return output.child(_STAGING)


def lease_file(output: Location) -> Location:
    """Where the lease of the run that holds the output is."""
    return output.child(_LEASE_FILE)


def part_names(output: Location, directory: str) -> set[str]:
    """Names of all files in completions/ or errors/, by one listing; parts and whatever else lies there."""
    return output.child(directory).names()


def parts(output: Location, directory: str) -> dict[str, FoundFile]:
    """The parts in completions/ or errors/ by unit id, by one listing; other files are left out."""
    return {unit_id: file for file in output.child(directory).files() if (unit_id := unit_id_of(file.name)) is not None}


def committed_units(output: Location) -> set[str]:
    """Ids of the units that are committed now, by one listing of completions/; other files are ignored."""
    return {unit_id for name in part_names(output, COMPLETIONS) if (unit_id := unit_id_of(name)) is not None}


def check_usable(output: Location) -> None:
    """OutputError for a file, and for a directory that holds something of which nothing is a batchinfer job."""
    if output.is_file():
        raise OutputError(f"{output}: is a file; output.path must name a directory, choose another one")
    top_level = {name for name in output.names() if not name.startswith(".")}
    foreign = sorted(top_level - {JOB})
    if foreign and read_job(output) is None:
        raise OutputError(
            f"{output}: holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''} but no batchinfer job; "
            "choose an empty or a new directory as output.path"
        )


def clear_staging(output: Location) -> None:
    """Remove what crashed writers left in ``_job/tmp``; only for the run that holds the lease."""
    for file in staging(output).files():
        staging(output).child(file.name).remove()


def remove_if_unused(output: Location) -> None:
    """Remove the directories of a run that ended before it wrote anything; nothing happens when a file is there."""
    for directory in (staging(output), output.child(JOB), output):
        directory.remove_empty_directory()


def set_aside(output: Location, unit_ids: Iterable[str]) -> None:
    """Move the parts of these units to ``_job/superseded``, where no reader of the product sees them.

    May be repeated. A crash between the two moves leaves the completions part, so the unit still counts as
    committed and the next run moves it again.
    """
    for unit_id in unit_ids:
        name = part_name(unit_id)
        errors_part(output, unit_id).move_to(output.child(f"{SUPERSEDED}/{ERRORS}/{name}"))
        completions_part(output, unit_id).move_to(output.child(f"{SUPERSEDED}/{COMPLETIONS}/{name}"))


def read_job(output: Location) -> dict[str, Any] | None:
    """job.json as it was given to ``write_job``, with ``format_version``; None when the output holds no job.

    Raises OutputError when it cannot be understood or is not as it was written.
    """
    place = output.child(_JOB_FILE)
    content = place.read_if_present()
    if content is None:
        return None
    try:
        text = content.decode()
        job = json.loads(text)
    except ValueError as error:
        raise OutputError(
            f"{place}: not readable as JSON ({error}); restore it or choose another output.path"
        ) from error
    version = job.get("format_version") if isinstance(job, dict) else None
    if version != FORMAT_VERSION:
        raise OutputError(
            f"{place}: format_version is {version!r}, this batchinfer reads {FORMAT_VERSION}; "
            "use the batchinfer version that wrote it or choose another output.path"
        )
    if not checksums.holds_in_json(text, job.pop("checksum", None)):
        raise OutputError(
            f"{place}: its checksum does not hold: it was changed by hand or by failing storage; restore it or choose "
            "another output.path"
        )
    return dict(job)


def write_job(output: Location, job: Mapping[str, Any]) -> None:
    """Write job.json in one atomic step; ``format_version`` and a checksum are added.

    The caller leaves credentials out.
    """
    content = json.dumps({"format_version": FORMAT_VERSION, **job}, indent=2, ensure_ascii=False, sort_keys=False)
    output.child(_JOB_FILE).write_replace(checksums.add_to_json(content).encode(), staging(output))


def write_plan(output: Location, plan: Plan) -> None:
    """Write plan.parquet in one atomic step, URIs without credentials. Units are not stored, they follow."""
    rows: list[dict[str, str | int | None]] = []
    for state, shards in (("present", plan.shards), ("retired", plan.retired)):
        rows += [
            {
                "state": state,
                "shard_id": shard.shard_id,
                "path": shard.path,
                "uri": redact(shard.uri),
                "num_rows": shard.num_rows,
                "size_bytes": shard.size_bytes,
                "rows_per_unit": shard.rows_per_unit,
                "error": None,
            }
            for shard in shards
        ]
    rows += [
        {
            "state": "unreadable",
            "path": shard.path,
            "uri": redact(shard.uri),
            "size_bytes": shard.size_bytes,
            "error": shard.error,
        }
        for shard in plan.unreadable
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_PLAN_SCHEMA), sink, compression="zstd")
    output.child(_PLAN_FILE).write_replace(checksums.add_to_parquet(sink.getvalue().to_pybytes()), staging(output))


def read_plan(output: Location) -> Plan | None:
    """The plan as last written, its units cut anew, or None when there is none. OutputError when damaged."""
    place = output.child(_PLAN_FILE)
    content = place.read_if_present()
    if content is None:
        return None
    try:
        rows = pq.read_table(pa.BufferReader(content)).cast(_PLAN_SCHEMA).to_pylist()
        if not checksums.holds_in_parquet(content):
            raise ValueError("its checksum does not hold")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise OutputError(f"{place}: damaged ({error}); remove it and run again to plan anew") from error
    present = _shards(rows, "present")
    return Plan(
        shards=present,
        units=tuple(unit for shard in present for unit in shard.units),
        unreadable=tuple(
            UnreadableShard(row["path"], row["uri"], row["size_bytes"], row["error"])
            for row in rows
            if row["state"] == "unreadable"
        ),
        retired=_shards(rows, "retired"),
    )


def _shards(rows: Sequence[Mapping[str, Any]], state: str) -> tuple[Shard, ...]:
    return tuple(
        Shard(row["shard_id"], row["path"], row["uri"], row["num_rows"], row["size_bytes"], row["rows_per_unit"])
        for row in rows
        if row["state"] == state
    )
