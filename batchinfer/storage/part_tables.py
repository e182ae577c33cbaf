"""What parts are made of: the tables of a unit's completions and dead letters, their metadata, their bytes. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.records import (
    ANSWERS,
    CHOICES,
    COMPLETION,
    FINISH_REASON,
    FORMAT_VERSION,
    LOGPROBS,
    NUM_COMPLETION_TOKENS,
    NUM_PROMPT_TOKENS,
    ROW_ID,
    SAMPLE,
    TOKEN_IDS,
    Answer,
    ChoiceScore,
    Completion,
    RowError,
    TokenLogprobs,
    WorkUnit,
)
from batchinfer.storage import checksums
from batchinfer.storage.checksums import LABEL_BYTES

#: Columns of a part by name, its key-value metadata, row offsets within a unit.
Columns = dict[str, "pa.Array[Any] | pa.ChunkedArray[Any]"]
Metadata = dict[bytes | str, bytes | str]
Offsets = np.ndarray[Any, np.dtype[np.int64]]

Compression = Literal["zstd", "snappy", "gzip", "lz4", "none"]

ERROR_TYPE = "error_type"
ERROR = "error"
ATTEMPTS = "attempts"
#: Of a label's bytes, those for the number of dead letters.
_NUMBER_BYTES = 4
_REASONS = (ERROR_TYPE, ERROR, ATTEMPTS)

_TOP = pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32())])
_LOGPROBS = pa.list_(
    pa.struct([pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32()), pa.field("top", pa.list_(_TOP))])
)
_CHOICES = pa.list_(
    pa.struct(
        [
            pa.field("choice", pa.string()),
            pa.field("logprob", pa.float32()),
            pa.field("probability", pa.float32()),
            pa.field("num_tokens", pa.int32()),
        ]
    )
)


_ANSWERS = pa.list_(
    pa.struct(
        [
            pa.field("completion", pa.string()),
            pa.field("finish_reason", pa.string()),
            pa.field("num_prompt_tokens", pa.int32()),
            pa.field("num_completion_tokens", pa.int32()),
        ]
    )
)


@dataclass(frozen=True, slots=True)
class PartFormat:
    """What every part of a run carries beside its rows, and which columns it has."""

    fingerprint: str
    run_id: str
    #: Input columns passed through, in this order.
    columns: tuple[str, ...]
    #: Samples per row the job asked for; rows may have asked for another number.
    n: int = 1
    token_ids: bool = False
    logprobs: bool = False
    choices: bool = False
    answers: bool = False
    compression: Compression = "zstd"


def by_row(unit: WorkUnit, completions: Sequence[Completion]) -> list[tuple[int, Completion]]:
    """Completions with their row offsets within the unit, by row and sample; ValueError for a row of another unit."""
    placed = [(_offset(unit, completion.row_id), completion) for completion in completions]
    return sorted(placed, key=lambda it: (it[0], it[1].sample))


def errors_by_row(unit: WorkUnit, errors: Sequence[RowError]) -> list[tuple[int, RowError]]:
    """Dead letters with their row offsets within the unit, by row; ValueError for a row of another unit."""
    return sorted(((_offset(unit, error.row_id), error) for error in errors), key=lambda it: it[0])


def _offset(unit: WorkUnit, row_id: str) -> int:
    row = row_id.removeprefix(f"{unit.shard_id}:")
    offset = int(row) - unit.first_row if row.isdecimal() else -1
    if not 0 <= offset < unit.num_rows:
        raise ValueError(f"row {row_id} does not belong to unit {unit.unit_id}")
    return offset


def lacking_offsets(unit: WorkUnit, row_ids: "pa.ChunkedArray[Any]") -> Offsets:
    """Offsets of the unit's rows that are not among ``row_ids``: its dead letters, when those are its completions."""
    present = set(row_ids.to_pylist())
    lacking = [offset for offset in range(unit.num_rows) if unit.row_id(offset) not in present]
    return np.array(lacking, np.int64)


@dataclass(frozen=True, slots=True)
class DeadRows:
    """Which rows of a unit are dead letters, as the labels of both its parts say it: equal where they belong together,
    whoever wrote them, and told without decoding anything."""

    number: int
    digest: bytes

    @classmethod
    def of(cls, unit: WorkUnit, offsets: Offsets) -> "DeadRows":
        """Of these offsets within the unit, ascending."""
        content = unit.unit_id.encode() + b"\0" + offsets.astype("<i8").tobytes()
        return cls(len(offsets), hashlib.sha256(content).digest()[: LABEL_BYTES - _NUMBER_BYTES])

    @classmethod
    def from_label(cls, label: bytes) -> "DeadRows":
        """What a part's label says."""
        return cls(int.from_bytes(label[:_NUMBER_BYTES], "big"), label[_NUMBER_BYTES:])

    @property
    def label(self) -> bytes:
        return self.number.to_bytes(_NUMBER_BYTES, "big") + self.digest


def part_metadata(unit: WorkUnit, part: PartFormat, num_completions: int, num_dead_letters: int) -> Metadata:
    """The key-value pairs in the footers of both parts of a unit."""
    return {
        "batchinfer.format_version": str(FORMAT_VERSION),
        "batchinfer.unit_id": unit.unit_id,
        "batchinfer.fingerprint": part.fingerprint,
        "batchinfer.run_id": part.run_id,
        "batchinfer.num_rows": str(unit.num_rows),
        "batchinfer.num_completions": str(num_completions),
        "batchinfer.num_dead_letters": str(num_dead_letters),
        "batchinfer.n": str(part.n),
    }


def completions_table(
    rows: pa.Table, offsets: Offsets, completions: Sequence[Completion], part: PartFormat, metadata: Metadata
) -> pa.Table:
    """One row per completion in the given order; ``offsets`` are their rows within ``rows``."""
    return _table(_taken(rows.select(list(part.columns)), offsets) | _generated(completions, part), metadata)


def errors_table(
    unit: WorkUnit, rows: pa.Table, offsets: Offsets, errors: Sequence[RowError], part: PartFormat, metadata: Metadata
) -> pa.Table:
    """One row per dead letter in the given order: its id, the input row (null where it could not be read), the reason.

    An input column that has the name of a reason's column is left out here; the completions part keeps it.
    """
    columns: Columns = {ROW_ID: pa.array([unit.row_id(int(offset)) for offset in offsets], pa.string())}
    passed = _taken(rows.select(list(part.columns)), offsets)
    columns |= {name: column for name, column in passed.items() if name not in _REASONS}
    columns[ERROR_TYPE] = pa.array([error.error_type for error in errors], pa.string())
    columns[ERROR] = pa.array([error.error for error in errors], pa.string())
    columns[ATTEMPTS] = pa.array([error.attempts for error in errors], pa.int32())
    return _table(columns, metadata)


def reasons_of(errors: pa.Table) -> dict[str, RowError]:
    """The dead letters of an errors table by row id; KeyError when it is none."""
    columns = (errors.column(name).to_pylist() for name in (ROW_ID, *_REASONS))
    return {row_id: RowError(row_id, *reason) for row_id, *reason in zip(*columns, strict=True)}


def part_bytes(table: pa.Table, dead_rows: DeadRows, compression: Compression) -> bytes:
    """A part as it goes to disk: Parquet with a checksum per page and one over everything, labelled."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, write_page_checksum=True)
    return checksums.add_to_parquet(sink.getvalue().to_pybytes(), dead_rows.label)


def _table(columns: Columns, metadata: Metadata) -> pa.Table:
    """Every column nullable, whatever the input declared, so that all parts of both kinds share their types."""
    schema = pa.schema([pa.field(name, column.type) for name, column in columns.items()], metadata=metadata)
    return pa.Table.from_arrays(list(columns.values()), schema=schema)


def _taken(passed: pa.Table, offsets: Offsets) -> Columns:
    """Input columns at the offsets; null where the row could not be read."""
    indices = cast(pa.Int64Array, pa.array(offsets, mask=offsets >= passed.num_rows))
    return {name: passed.column(name).take(indices) for name in passed.column_names}


def _generated(completions: Sequence[Completion], part: PartFormat) -> Columns:
    columns: Columns = {
        ROW_ID: pa.array([c.row_id for c in completions], pa.string()),
        SAMPLE: pa.array([c.sample for c in completions], pa.int32()),
        COMPLETION: pa.array([c.text for c in completions], pa.string()),
        FINISH_REASON: pa.array([c.finish_reason for c in completions], pa.string()),
        NUM_PROMPT_TOKENS: pa.array([c.num_prompt_tokens for c in completions], pa.int32()),
        NUM_COMPLETION_TOKENS: pa.array([len(c.token_ids) for c in completions], pa.int32()),
    }
    if part.token_ids:
        columns[TOKEN_IDS] = pa.array([c.token_ids for c in completions], pa.list_(pa.int32()))
    if part.logprobs:
        columns[LOGPROBS] = _logprobs([c.logprobs for c in completions])
    if part.choices:
        columns[CHOICES] = _choices([c.choices for c in completions])
    if part.answers:
        columns[ANSWERS] = _answers([c.answers for c in completions])
    return columns


def _logprobs(rows: Sequence[tuple[TokenLogprobs, ...] | None]) -> "pa.Array[Any]":
    """Built from flat columns and offsets: a dict per token would cost more than the rest of the part."""
    tokens = [token for row in rows for token in row or ()]
    top = [candidate for token in tokens for candidate in token.top]
    top_structs = pa.StructArray.from_arrays(
        [pa.array([token_id for token_id, _ in top], pa.int32()), pa.array([p for _, p in top], pa.float32())],
        fields=list(_TOP),
    )
    top_lists = _lists([len(token.top) for token in tokens], top_structs)
    token_structs = pa.StructArray.from_arrays(
        [
            pa.array([token.token_id for token in tokens], pa.int32()),
            pa.array([token.logprob for token in tokens], pa.float32()),
            top_lists,
        ],
        fields=list(_LOGPROBS.value_type),
    )
    is_null = pa.array([row is None for row in rows], pa.bool_())
    return _lists([len(row or ()) for row in rows], token_structs, mask=is_null)


def _choices(rows: Sequence[tuple[ChoiceScore, ...] | None]) -> "pa.Array[Any]":
    """Null where a row had none."""
    scores = [score for row in rows for score in row or ()]
    structs = pa.StructArray.from_arrays(
        [
            pa.array([score.choice for score in scores], pa.string()),
            pa.array([score.logprob for score in scores], pa.float32()),
            pa.array([score.probability for score in scores], pa.float32()),
            pa.array([score.num_tokens for score in scores], pa.int32()),
        ],
        fields=list(_CHOICES.value_type),
    )
    is_null = pa.array([row is None for row in rows], pa.bool_())
    return _lists([len(row or ()) for row in rows], structs, mask=is_null)


def _answers(rows: Sequence[tuple[Answer, ...] | None]) -> "pa.Array[Any]":
    """Null where a row was no conversation."""
    answers = [answer for row in rows for answer in row or ()]
    structs = pa.StructArray.from_arrays(
        [
            pa.array([answer.completion for answer in answers], pa.string()),
            pa.array([answer.finish_reason for answer in answers], pa.string()),
            pa.array([answer.num_prompt_tokens for answer in answers], pa.int32()),
            pa.array([answer.num_completion_tokens for answer in answers], pa.int32()),
        ],
        fields=list(_ANSWERS.value_type),
    )
    is_null = pa.array([row is None for row in rows], pa.bool_())
    return _lists([len(row or ()) for row in rows], structs, mask=is_null)


def _lists(lengths: Sequence[int], values: "pa.Array[Any]", mask: pa.BooleanArray | None = None) -> "pa.ListArray[Any]":
    """``values`` dealt out to lists of these lengths in order."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return pa.ListArray.from_arrays(cast(pa.Int32Array, pa.array(starts)), values, mask=mask)
