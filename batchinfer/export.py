"""An output's completions copied out as numbered files, in the input's row order if asked, as Parquet or JSON lines.

The product itself is one part per work unit, named after its shard: right for resuming, not in the input's order.
Memory holds one file at a time.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import EXIT_COMPLETE, EXIT_DEAD_LETTERS, EXIT_RUN_AGAIN, OutputError
from batchinfer.storage.filesystem import StorageOptions, canonical_uri, locate
from batchinfer.storage.layout import ERRORS, committed_units, completions_part, part_names, read_plan, unit_id_of
from batchinfer.storage.location import Location
from batchinfer.storage.part_reader import read_part

__all__ = ["ExportResult", "Format", "export"]

Format = Literal["parquet", "jsonl"]

#: A file is closed once it holds this much, uncompressed.
MAX_FILE_BYTES = 256 << 20
#: Parts fetched ahead of the one being written.
_PARTS_AHEAD = 8


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was copied, and what the output lacked at that moment."""

    target: str
    num_files: int
    num_completions: int
    num_units: int
    num_units_missing: int
    num_units_with_dead_letters: int

    @property
    def exit_code(self) -> int:
        """0 all there, 1 but for dead letters, 3 units are not committed yet: run the job and export again."""
        if self.num_units_missing:
            return EXIT_RUN_AGAIN
        return EXIT_DEAD_LETTERS if self.num_units_with_dead_letters else EXIT_COMPLETE

    def as_json(self) -> dict[str, object]:
        """For ``--json``: plain values only."""
        return {"exit_code": self.exit_code, **asdict(self)}


def export(
    output_path: str,
    target_path: str,
    format_: Format = "parquet",
    *,
    ordered: bool = False,
    storage_options: StorageOptions | None = None,
    target_options: StorageOptions | None = None,
) -> ExportResult:
    """Copy every committed completion to ``<target>/part-<number>.<format>``, whole files only.

    ``ordered`` gives the input's order: shards as the plan has them, rows as the shard has them, then samples. Rows
    without a completion leave no gap; ``row_id`` tells where a row belongs. May be repeated: files are replaced, and
    numbered ones of an earlier export beyond the last are removed.

    Raises OutputError when there is no job, or the target lies inside the output; StorageUnavailable when the storage
    does not answer.
    """
    output = locate(output_path, storage_options)
    target = locate(target_path, target_options)
    ours, theirs = canonical_uri(output_path), canonical_uri(target_path)
    if theirs == ours or theirs.startswith(ours.rstrip("/") + "/"):
        raise OutputError(f"{target}: lies inside the output {output}; choose a directory beside it")
    plan = read_plan(output)
    if plan is None:
        raise OutputError(f"{output}: no batchinfer job there; check the path")
    committed = committed_units(output)
    planned = [unit.unit_id for shard in (*plan.retired, *plan.shards) for unit in shard.units]
    if not ordered:
        planned.sort()
    unit_ids = [unit_id for unit_id in planned if unit_id in committed]
    failed = {unit_id_of(name) for name in part_names(output, ERRORS)} & committed
    missing = sum(unit.unit_id not in committed for unit in plan.units)

    num_files = num_completions = 0
    for tables in _files(_tables(output, unit_ids)):
        table = pa.concat_tables(tables, promote_options="permissive")
        target.child(_name(num_files, format_)).write_replace(_encoded(table, format_), target.child("_tmp"))
        num_files += 1
        num_completions += table.num_rows
    _remove_older(target, num_files, format_)
    return ExportResult(str(target), num_files, num_completions, len(plan.units), missing, len(failed))


def _tables(output: Location, unit_ids: list[str]) -> Iterator[pa.Table]:
    """The parts' tables in this order, a few of them fetched ahead."""

    def read(unit_id: str) -> pa.Table:
        return read_part(completions_part(output, unit_id)).replace_schema_metadata(None)

    with ThreadPoolExecutor(_PARTS_AHEAD, thread_name_prefix="export") as pool:
        waiting = iter(unit_ids)
        ahead = [pool.submit(read, unit_id) for unit_id in islice(waiting, _PARTS_AHEAD)]
        while ahead:
            table = ahead.pop(0).result()
            ahead += [pool.submit(read, unit_id) for unit_id in islice(waiting, 1)]
            yield table


def _files(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables gathered to files of about ``MAX_FILE_BYTES``; one empty file where there is nothing, for its columns."""
    gathered: list[pa.Table] = []
    empty: pa.Table | None = None
    num_bytes = num_files = 0
    for table in tables:
        if not table.num_rows:
            empty = table
            continue
        gathered.append(table)
        num_bytes += table.nbytes
        if num_bytes >= MAX_FILE_BYTES:
            yield gathered
            gathered, num_bytes, num_files = [], 0, num_files + 1
    if gathered:
        yield gathered
    elif not num_files and empty is not None:
        yield [empty]


def _name(number: int, format_: Format) -> str:
    return f"part-{number:05d}.{format_}"


def _remove_older(target: Location, num_files: int, format_: Format) -> None:
    """An earlier, longer export would otherwise leave rows twice."""
    current = {_name(number, format_) for number in range(num_files)}
    for name in target.names():
        number = name.removeprefix("part-").removesuffix(f".{format_}")
        if name == f"part-{number}.{format_}" and number.isdecimal() and name not in current:
            target.child(name).remove()
    target.child("_tmp").remove_empty_directory()


def _encoded(table: pa.Table, format_: Format) -> bytes:
    if format_ == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()
    lines = io.BytesIO()
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            lines.write(json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n")
    return lines.getvalue()


def _plain(value: object) -> object:
    """What JSON has no word for: bytes as base64, moments as ISO 8601, decimals as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a column holds {type(value).__name__}, which JSON lines cannot; export it as parquet")
