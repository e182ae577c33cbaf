"""Files to shards: how many rows each holds, of which columns, and what its identity is.

Of Parquet files the footers are read, JSON Lines are read whole.
"""

import logging
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import pyarrow as pa

from batchinfer.errors import InputError, ShardCorrupt
from batchinfer.planner.columns import InputSchema
from batchinfer.planner.listing import Candidate, candidates
from batchinfer.records import Plan, Shard, UnreadableShard
from batchinfer.redact import redact
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import StorageOptions
from batchinfer.storage.footer import read_footer, shard_id
from batchinfer.storage.input_formats import ChosenFormat, format_by_name
from batchinfer.storage.jsonl_scan import ScannedLines, scan_lines
from batchinfer.storage.jsonl_stream import compression_of
from batchinfer.storage.jsonl_types import Kind, Survey
from batchinfer.storage.jsonl_values import ASKED, JSON_TEXT

log = logging.getLogger(__name__)

_FOOTER_THREADS = 16
#: Each holds some ten MiB of a shard.
_SCAN_THREADS = 8


@dataclass(frozen=True, slots=True)
class InputPlan:
    """The input as it is now. ``schemas`` leaves out empty shards: they pass nothing through."""

    plan: Plan
    schemas: tuple[InputSchema, ...]


def plan_input(
    paths: Sequence[str],
    storage_options: StorageOptions | None,
    rows_per_unit: int,
    policy: RetryPolicy | None = None,
    chosen: ChosenFormat = "auto",
    json_text_columns: Collection[str] = (),
    expected: Mapping[str, pa.DataType] | None = None,
) -> InputPlan:
    """List the shards that ``paths`` name and look into them, in parallel.

    Each path is a file, a directory (searched at every depth for files with a format's suffix) or a glob, the first of
    these that it is; names that start with ``_`` or ``.`` are skipped. Shards keep the order of ``paths``, sorted by
    name within one. A shard that cannot be read becomes an UnreadableShard.

    JSON Lines get one schema for all shards: ``json_text_columns`` are JSON texts whatever they hold, a column in
    ``expected`` has that type if any of its values has, and one whose values have no common type becomes JSON text.

    Raises InputError when a path is missing, names a shard that another path names too, or nothing readable is found;
    StorageUnavailable when the storage fails.
    """
    found = candidates(paths, storage_options, chosen, policy)
    if found[0].format == "parquet":
        looks = _parquet_shards(found, rows_per_unit)
    else:
        looks = _jsonl_shards(found, rows_per_unit, json_text_columns, expected or {})
    if not looks.shards:
        first = looks.unreadable[0]
        raise InputError(
            f"none of {len(looks.unreadable)} shards can be read; the first, {redact(first.uri)}: {first.error}"
        )
    shards = tuple(looks.shards)
    plan = Plan(shards, tuple(unit for shard in shards for unit in shard.units), tuple(looks.unreadable))
    return InputPlan(plan, tuple(looks.schemas))


@dataclass(slots=True)
class _Looks:
    """What the files were found to be."""

    shards: list[Shard] = field(default_factory=list)
    unreadable: list[UnreadableShard] = field(default_factory=list)
    schemas: list[InputSchema] = field(default_factory=list)

    def leave_out(self, candidate: Candidate, error: Exception) -> None:
        """Name a file whose rows are not part of the plan."""
        cause = redact(str(error))
        log.warning("%s: %s; its rows are not part of this run", candidate.location, cause)
        self.unreadable.append(UnreadableShard(candidate.path, candidate.location.uri, candidate.size_bytes, cause))


def _parquet_shards(found: Sequence[Candidate], rows_per_unit: int) -> _Looks:
    looks = _Looks()
    schemas: dict[pa.Schema, InputSchema] = {}
    with ThreadPoolExecutor(max_workers=_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        for candidate, look in zip(found, pool.map(lambda it: _footer(it, rows_per_unit), found), strict=True):
            if isinstance(look, Exception):
                looks.leave_out(candidate, look)
                continue
            shard, schema = look
            looks.shards.append(shard)
            if shard.num_rows:
                schemas.setdefault(schema, InputSchema(schema, shard))
    looks.schemas = list(schemas.values())
    return looks


def _footer(candidate: Candidate, rows_per_unit: int) -> tuple[Shard, pa.Schema] | Exception:
    size_bytes = candidate.size_bytes
    try:
        footer, metadata = read_footer(candidate.location, size_bytes)
        schema = _without_dictionaries(metadata.schema.to_arrow_schema())
    except (ShardCorrupt, pa.ArrowException, InputError) as error:
        # InputError: listed, but gone or forbidden by now; the others go on.
        if isinstance(error, ShardCorrupt) and format_by_name(candidate.path) is None:
            return ShardCorrupt(f"{error}; for JSON Lines of this name set input.format: jsonl")
        return error
    identity = shard_id(candidate.path, size_bytes, footer)
    uri = candidate.location.uri
    return Shard(identity, candidate.path, uri, metadata.num_rows, size_bytes, rows_per_unit), schema


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """Categorical columns as what they hold: each shard has a dictionary of its own, the output has none."""
    fields = [
        field.with_type(field.type.value_type) if isinstance(field.type, pa.DictionaryType) else field
        for field in schema
    ]
    return pa.schema(fields)


def _jsonl_shards(
    found: Sequence[Candidate], rows_per_unit: int, as_texts: Collection[str], expected: Mapping[str, pa.DataType]
) -> _Looks:
    looks = _Looks()
    rows = Survey()
    rejected: dict[str, int] = {}
    with closing(_scans(found, as_texts)) as scans:
        for candidate, look in zip(found, scans, strict=True):
            if isinstance(look, Exception):
                looks.leave_out(candidate, look)
                continue
            uri, size_bytes = candidate.location.uri, candidate.size_bytes
            looks.shards.append(
                Shard(look.shard_id, candidate.path, uri, look.num_rows, size_bytes, rows_per_unit, look.lines)
            )
            rows.merge(look.rows)
            if look.num_rejected:
                rejected[candidate.path] = look.num_rejected
    if rejected:
        log.warning(
            "%d lines of %d shards are no JSON objects, %d of them in %s; their rows become dead letters (bad_json)",
            sum(rejected.values()),
            len(rejected),
            *next((number, path) for path, number in rejected.items()),
        )
    with_rows = next((shard for shard in looks.shards if shard.num_rows), None)
    if with_rows is not None:
        looks.schemas = [InputSchema(_schema(rows, as_texts, expected), with_rows)]
    return looks


def _scans(found: Sequence[Candidate], as_texts: Collection[str]) -> Generator[ScannedLines | Exception, None, None]:
    """What each file holds, in order; to be closed where it is not read to its end."""
    # Left from the last to the first: a scan that is broken off may have gigabytes ahead of it, but ends at once when
    # the parsers are gone.
    with (
        ThreadPoolExecutor(max_workers=_SCAN_THREADS, thread_name_prefix="scan") as pool,
        ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="parse") as parsers,
    ):

        def scan(candidate: Candidate) -> ScannedLines | Exception:
            compression = compression_of(candidate.path)
            try:
                return scan_lines(
                    candidate.location, candidate.path, candidate.size_bytes, compression, as_texts, parsers
                )
            except (ShardCorrupt, InputError) as error:
                # InputError: listed, but gone or forbidden by now; the others go on.
                return error

        yield from pool.map(scan, found)


def _schema(rows: Survey, as_texts: Collection[str], expected: Mapping[str, pa.DataType]) -> pa.Schema:
    if Kind.MAP in rows.kinds:
        raise InputError("the lines of the input have more than a thousand different keys; put them below a few")
    fields: list[pa.Field[pa.DataType]] = []
    for name, column in rows.fields.items():
        if name in as_texts:
            fields.append(pa.field(name, pa.string(), metadata={JSON_TEXT: ASKED}))
            continue
        type_ = column.arrow_type(expected.get(name))
        if type_ is not None:
            fields.append(pa.field(name, type_))
            continue
        mixture = column.mixture()
        log.warning("column %r holds %s; its values are written as JSON texts", name, mixture)
        fields.append(pa.field(name, pa.string(), metadata={JSON_TEXT: mixture.encode()}))
    return pa.schema(fields)
