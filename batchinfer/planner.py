"""Input paths to a plan: which shards there are, how many rows they hold, and how they are cut into work units.

Footers only; rows are read by replicas. Reading the input is here, what a resume makes of an earlier plan is in
``merge_plans``, a pure function.
"""

import difflib
import logging
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import pyarrow as pa

from batchinfer.errors import InputError, OutputError, ShardCorrupt
from batchinfer.records import GENERATED_COLUMNS, Plan, Shard, UnreadableShard
from batchinfer.redact import redact, without_query
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import StorageOptions, canonical_uri, locate
from batchinfer.storage.footer import read_footer, shard_id
from batchinfer.storage.location import FoundFile, Location

log = logging.getLogger(__name__)

_FOOTER_THREADS = 16
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class InputSchema:
    """One of the distinct Arrow schemas of the input, with a shard that has it."""

    schema: pa.Schema
    example: Shard


@dataclass(frozen=True, slots=True)
class InputPlan:
    """The input as it is now. ``schemas`` leaves out empty shards: they pass nothing through."""

    plan: Plan
    schemas: tuple[InputSchema, ...]


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """What an output is to hold after this run, and what has to leave it first."""

    plan: Plan
    #: Shards of the earlier plan whose file has changed; their rows are generated anew under another shard id.
    superseded: tuple[Shard, ...]
    #: Committed units that no shard of the plan has: move their parts with ``layout.set_aside`` before the plan
    #: is written, so that a crash between leaves the earlier plan and the next run finds the same again.
    superseded_units: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: str
    location: Location
    size_bytes: int


def plan_input(
    paths: Sequence[str],
    storage_options: StorageOptions | None,
    rows_per_unit: int,
    policy: RetryPolicy | None = None,
) -> InputPlan:
    """List the shards that ``paths`` name and read their footers, in parallel.

    Each path is a file, a directory (searched at every depth for ``*.parquet``) or a glob, the first of these that it
    is; names that start with ``_`` or ``.`` are skipped. Shards keep the order of ``paths``, sorted by name within
    one. A shard whose footer cannot be read becomes an UnreadableShard. Raises InputError when a path is missing,
    names a shard that another path names too, or nothing readable is found; StorageUnavailable when the storage fails.
    """
    candidates = [candidate for path in paths for candidate in _candidates(path, storage_options, policy)]
    _refuse_duplicates(candidates)
    if not candidates:
        raise InputError(
            f"no shards in {_shown(paths)}: expected *.parquet files (names with _ or . in front are skipped)"
        )

    shards: list[Shard] = []
    unreadable: list[UnreadableShard] = []
    schemas: dict[pa.Schema, InputSchema] = {}
    with ThreadPoolExecutor(max_workers=_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        for candidate, (shard, schema) in zip(
            candidates, pool.map(lambda it: _read_shard(it, rows_per_unit), candidates), strict=True
        ):
            if isinstance(shard, UnreadableShard):
                log.warning("%s: %s; its rows are not part of this run", candidate.location, shard.error)
                unreadable.append(shard)
                continue
            shards.append(shard)
            if schema is not None and shard.num_rows:
                schemas.setdefault(schema, InputSchema(schema, shard))
    if not shards:
        first = unreadable[0]
        raise InputError(f"none of {len(unreadable)} shards can be read; the first, {redact(first.uri)}: {first.error}")
    plan = Plan(tuple(shards), tuple(unit for shard in shards for unit in shard.units), tuple(unreadable))
    return InputPlan(plan, tuple(schemas.values()))


def columns_to_read(
    schemas: Sequence[InputSchema], needed: Collection[str], passed_through: Sequence[str] | None
) -> tuple[pa.Schema, tuple[str, ...]]:
    """The one schema all shards are read with, and the columns passed through to the output.

    ``needed`` are the columns prompts are made of; ``passed_through`` None means all. Across shards a column may
    be null-typed, or large_string here and string there; any other difference of a column that is read raises
    InputError naming both shards, as does a missing column. Without any row there is nothing to check and
    the schema is empty.
    """
    if not schemas:
        return pa.schema([]), ()
    passed = tuple(schemas[0].schema.names if passed_through is None else passed_through)
    wanted = [*passed, *(name for name in sorted(needed) if name not in passed)]
    for each in schemas:
        _check_columns(each, wanted)
        if passed_through is None:
            _check_all_columns(schemas[0], each)
    return pa.schema([_common_field(name, schemas) for name in wanted]), passed


def merge_plans(previous: Plan | None, current: Plan, committed: Collection[str]) -> MergedPlan:
    """The plan of an output that may hold committed units of an earlier one.

    A shard id known before keeps its rows_per_unit, so that a changed setting cannot cut rows twice. A shard whose
    path now has another id is superseded; one whose path is gone (or unreadable) is retired, and what is committed
    of it stays. ``committed`` are the ids of units committed in the output.
    """
    known = {shard.shard_id: shard for shard in (*previous.shards, *previous.retired)} if previous else {}
    shards = tuple(
        replace(shard, rows_per_unit=known[shard.shard_id].rows_per_unit) if shard.shard_id in known else shard
        for shard in current.shards
    )
    present_ids = {shard.shard_id for shard in shards}
    present_paths = {shard.path for shard in shards}
    gone = [shard for shard in known.values() if shard.shard_id not in present_ids]
    superseded = tuple(shard for shard in gone if shard.path in present_paths)
    retired = tuple(shard for shard in gone if shard.path not in present_paths)
    plan = Plan(shards, tuple(unit for shard in shards for unit in shard.units), current.unreadable, retired)

    expected = {unit.unit_id for unit in plan.units} | {unit.unit_id for shard in retired for unit in shard.units}
    return MergedPlan(plan, superseded, tuple(sorted(unit_id for unit_id in committed if unit_id not in expected)))


def check_output_apart(input_paths: Sequence[str], output_path: str) -> None:
    """OutputError when the output would lie inside the input, the input inside the output, or both are one.

    No request is sent. A glob that cannot reach below the output (``data/*.parquet`` with ``data/out``) is fine.
    """
    output = canonical_uri(output_path)
    # As a glob and as a name that only looks like one: no request is sent, so it might be either.
    readings = [(path, *reading) for path in input_paths for reading in dict.fromkeys((_split_glob(path), (path, "")))]
    for path, root, pattern in readings:
        source = canonical_uri(root)
        shown_input, shown_output = f"input.path {redact(path)}", f"output.path {redact(output_path)}"
        if output == source:
            raise OutputError(f"{shown_output} is where {shown_input} lies; choose another output.path")
        if _is_inside(source, output):
            raise OutputError(f"{shown_input} lies inside {shown_output}; choose another output.path")
        if _is_inside(output, source):
            below = output.removeprefix(source).strip("/").split("/")
            if not pattern or _reaches(pattern, below):
                raise OutputError(
                    f"{shown_output} lies inside {shown_input}: the next run would read this run's completions; "
                    "choose an output.path beside the input"
                )


def _candidates(path: str, storage_options: StorageOptions | None, policy: RetryPolicy | None) -> list[_Candidate]:
    place = locate(path, storage_options, blames=InputError, policy=policy)
    if place.is_file():
        # Row ids and the plan are made of the name: no place for a signature, which would change them with every run.
        name = without_query(path).rstrip("/").rpartition("/")[2]
        return [_Candidate(name, place, place.size_bytes())]
    root_path, pattern = _split_glob(path)
    # A directory whose name only looks like a glob is that directory, as the file above is that file.
    if pattern and not place.is_directory():
        root = locate(root_path, storage_options, blames=InputError, policy=policy)
        visible = [file for file in root.glob(pattern) if not _is_hidden(file.name)]
        if not visible:
            raise InputError(f"{redact(path)}: the glob matches no file; check it (** spans directories)")
        return [_Candidate(file.name, root.child(file.name), file.size_bytes) for file in visible]
    if not place.is_directory():
        raise InputError(f"{place}: no such file or directory; check input.path and its storage_options")
    visible = [file for file in place.files() if not _is_hidden(file.name)]
    others = [file.name for file in visible if not _is_parquet(file)]
    if others:
        log.info("%s: %d files that are not *.parquet are left out, such as %s", place, len(others), others[0])
    return [_Candidate(file.name, place.child(file.name), file.size_bytes) for file in visible if _is_parquet(file)]


def _read_shard(candidate: _Candidate, rows_per_unit: int) -> tuple[Shard | UnreadableShard, pa.Schema | None]:
    uri = candidate.location.uri
    try:
        footer, metadata = read_footer(candidate.location, candidate.size_bytes)
        schema = _without_dictionaries(metadata.schema.to_arrow_schema())
    except (ShardCorrupt, pa.ArrowException, InputError) as error:
        # InputError: listed, but gone or forbidden by now; the others go on.
        return UnreadableShard(candidate.path, uri, candidate.size_bytes, redact(str(error))), None
    identity = shard_id(candidate.path, candidate.size_bytes, footer)
    return Shard(identity, candidate.path, uri, metadata.num_rows, candidate.size_bytes, rows_per_unit), schema


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """Categorical columns as what they hold: each shard has a dictionary of its own, the output has none."""
    fields = [
        field.with_type(field.type.value_type) if isinstance(field.type, pa.DictionaryType) else field
        for field in schema
    ]
    return pa.schema(fields)


def _refuse_duplicates(candidates: Iterable[_Candidate]) -> None:
    seen: dict[str, _Candidate] = {}
    for candidate in candidates:
        other = seen.setdefault(candidate.path, candidate)
        if other is candidate:
            continue
        if other.location.uri == candidate.location.uri:
            raise InputError(f"input.path names {candidate.location} twice; leave one out")
        raise InputError(
            f"{other.location} and {candidate.location} are both {candidate.path!r} relative to their input.path, and "
            "row ids are made of that; give a directory or a glob that holds both"
        )


def _check_columns(each: InputSchema, wanted: Sequence[str]) -> None:
    names = each.schema.names
    for name in wanted:
        num_found = names.count(name)
        if num_found == 1:
            continue
        if num_found:
            raise InputError(f"shard {each.example.path} has {num_found} columns named {name!r}; rename all but one")
        near = difflib.get_close_matches(name, names, n=1)
        known = f"did you mean {near[0]!r}? It has:" if near else "it has:"
        raise InputError(f"shard {each.example.path} has no column {name!r}; {known} {', '.join(names)}")


def _check_all_columns(first: InputSchema, each: InputSchema) -> None:
    clash = sorted(set(each.schema.names) & set(GENERATED_COLUMNS))
    if clash:
        raise InputError(
            f"shard {each.example.path} has columns that the job adds itself: {', '.join(clash)}; rename them, or list "
            "the columns to pass through in output.columns"
        )
    extra = sorted(set(each.schema.names) - set(first.schema.names))
    if extra:
        raise InputError(
            f"shard {each.example.path} has columns that shard {first.example.path} lacks: {', '.join(extra)}; list "
            "the columns to pass through in output.columns"
        )


def _common_field(name: str, schemas: Sequence[InputSchema]) -> "pa.Field[pa.DataType]":
    settled, settled_by = schemas[0].schema.field(name).type, schemas[0]
    for each in schemas[1:]:
        found = each.schema.field(name).type
        if pa.types.is_null(settled):
            settled, settled_by = found, each
        elif not pa.types.is_null(found) and _plain(found) != _plain(settled):
            raise InputError(
                f"column {name!r} is {settled} in shard {settled_by.example.path} but {found} in shard "
                f"{each.example.path}; write both with one type, or leave it out of output.columns"
            )
    return pa.field(name, settled)


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type without the width of its offsets: string and large_string hold the same values."""
    if pa.types.is_large_string(type_):
        return pa.string()
    if pa.types.is_large_binary(type_):
        return pa.binary()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return pa.list_(pa.field("element", _plain(type_.value_type)))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in type_])
    return type_


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _is_parquet(file: FoundFile) -> bool:
    return file.name.lower().endswith(".parquet")


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(redact(path) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")


def _split_glob(path: str) -> tuple[str, str]:
    """(fixed prefix directory, pattern relative to it); the pattern is empty when the path is no glob."""
    scheme, separator, rest = path.rpartition("://")
    parts = rest.split("/")
    for index, part in enumerate(parts):
        if _GLOB_CHARACTERS & set(part):
            prefix = "/".join(parts[:index]) or ("/" if rest.startswith("/") else ".")
            return scheme + separator + prefix, "/".join(parts[index:])
    return path, ""


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and inner.startswith(outer.rstrip("/") + "/")


def _reaches(pattern: str, below: Sequence[str]) -> bool:
    """Whether a glob may match a part of an output that lies ``below`` the glob's fixed prefix."""
    parts = pattern.split("/")
    if "**" in parts:
        return True
    # A part is two names below its output.
    if len(parts) != len(below) + 2:
        return False
    return all(fnmatchcase(name, part) for name, part in zip(below, parts, strict=False))
