"""A journal's segment: one immutable file of records, in Arrow's stream format with a checksum behind its end.

Encoding and decoding alone; what records mean, and in which order they count, is ``journal``'s.
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

from batchinfer.records import FORMAT_VERSION, FinishReason, RowError, TokenLogprobs

Tokens = np.ndarray[Any, np.dtype[np.int32]]

_NUM_DIGEST_BYTES: Final = 16

_FIELDS: "Final[list[pa.Field[Any]]]" = [
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("turn", pa.int32(), nullable=False),
    pa.field("prompt_checksum", pa.uint32(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
    pa.field("prefix_checksum", pa.uint32(), nullable=False),
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    # One per token, and the likeliest tokens beside it, all of a record's tokens in one list.
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("num_top", pa.list_(pa.int32())),
    pa.field("top_ids", pa.list_(pa.int32())),
    pa.field("top_logprobs", pa.list_(pa.float32())),
    pa.field("finish_reason", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error", pa.string()),
    pa.field("attempts", pa.int32()),
]
_SCHEMA: Final = pa.schema(_FIELDS)
_NUMBERS: Final = ("sample", "turn", "prompt_checksum", "position", "prefix_checksum")
_ERROR_FIELDS: Final = ("error_type", "error", "attempts")
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="zstd")


class SegmentDamaged(Exception):
    """The bytes are not a whole segment of this unit and fingerprint; says why."""


@dataclass(frozen=True, slots=True)
class SegmentOrigin:
    """Whose segment it is: the job's, the unit's, the writer's."""

    fingerprint: str
    unit_id: str
    run_id: str
    lease: int


@dataclass(frozen=True, slots=True, eq=False)
class JournalRecord:
    """News of one sequence: its tokens from ``position`` on, and its end if it has one."""

    row_id: str
    sample: int
    position: int
    #: Of the tokens before ``position``: a record counts only behind the very tokens it was written behind.
    prefix_checksum: int
    token_ids: Tokens
    #: Of a conversation; and of the prompt of a turn behind the first, which is made of the answers before it.
    turn: int = 0
    prompt_checksum: int = 0
    #: One for each of ``token_ids``, or None where the prompt asked for none.
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    error: RowError | None = None


def tokens_of(token_ids: Sequence[int]) -> Tokens:
    """Token ids as records hold them."""
    return np.array(token_ids, np.int32)


def checksum(tokens: Tokens, before: int = 0) -> int:
    """Checksum of tokens that follow those with the checksum ``before``; that of no tokens is 0."""
    return zlib.crc32(tokens.astype("<i4", copy=False).tobytes(), before)


def encode_segment(records: Sequence[JournalRecord], origin: SegmentOrigin) -> bytes:
    """The file's bytes."""
    schema = _SCHEMA.with_metadata(_metadata(origin))
    logprobs = [record.logprobs for record in records]
    tokens = [token for each in logprobs for token in each or ()]
    num_top = [sum(len(token.top) for token in each or ()) for each in logprobs]
    has_none = pa.array([each is None for each in logprobs], pa.bool_())
    num_logprobs = [len(each or ()) for each in logprobs]
    errors = [record.error for record in records]
    columns: list[pa.Array[Any]] = [
        pa.array([record.row_id for record in records], pa.string()),
        pa.array([record.sample for record in records], pa.int32()),
        pa.array([record.turn for record in records], pa.int32()),
        pa.array([record.prompt_checksum for record in records], pa.uint32()),
        pa.array([record.position for record in records], pa.int32()),
        pa.array([record.prefix_checksum for record in records], pa.uint32()),
        _lists(
            [len(record.token_ids) for record in records],
            np.concatenate([np.empty(0, np.int32), *(record.token_ids for record in records)]),
        ),
        _lists(num_logprobs, np.fromiter((token.logprob for token in tokens), np.float32, len(tokens)), has_none),
        _lists(num_logprobs, np.fromiter((len(token.top) for token in tokens), np.int32, len(tokens)), has_none),
        _lists(
            num_top, np.fromiter((item for token in tokens for item, _ in token.top), np.int32, sum(num_top)), has_none
        ),
        _lists(num_top, np.fromiter((p for token in tokens for _, p in token.top), np.float32, sum(num_top)), has_none),
        pa.array([record.finish_reason for record in records], pa.string()),
        pa.array([None if error is None else error.error_type for error in errors], pa.string()),
        pa.array([None if error is None else error.error for error in errors], pa.string()),
        pa.array([None if error is None else error.attempts for error in errors], pa.int32()),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_OPTIONS) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    content = sink.getvalue().to_pybytes()
    return content + _digest(content)


def decode_segment(content: bytes, origin: SegmentOrigin) -> list[JournalRecord]:
    """The records, as they were written.

    Raises SegmentDamaged for a torn or changed file, one under another's name, and one of another fingerprint.
    """
    stream, digest = content[:-_NUM_DIGEST_BYTES], content[-_NUM_DIGEST_BYTES:]
    if _digest(stream) != digest:
        raise SegmentDamaged("its checksum does not fit its bytes: torn or changed")
    try:
        table = pa.ipc.open_stream(stream).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SegmentDamaged(f"not readable ({error})") from error
    metadata = table.schema.metadata or {}
    wrong = [
        f"{name.decode()} is {metadata.get(name, b'missing').decode(errors='replace')} instead of {value.decode()}"
        for name, value in _metadata(origin).items()
        if metadata.get(name) != value
    ]
    if wrong:
        raise SegmentDamaged("; ".join(wrong))
    if not table.schema.equals(_SCHEMA):
        raise SegmentDamaged("its columns are not a journal's")
    return list(_records(table))


def _records(table: pa.Table) -> Iterable[JournalRecord]:
    plain: dict[str, list[Any]] = {
        name: table.column(name).to_pylist() for name in (*_NUMBERS, "row_id", "finish_reason", *_ERROR_FIELDS)
    }
    lists = {name: _slices(table, name) for name in ("token_ids", "logprobs", "num_top", "top_ids", "top_logprobs")}
    has_logprobs = table.column("logprobs").is_valid().to_pylist()
    for index, row_id in enumerate(plain["row_id"]):
        tokens = cast(Tokens, lists["token_ids"][index])
        error_type, error, attempts = (plain[name][index] for name in _ERROR_FIELDS)
        yield JournalRecord(
            row_id=row_id,
            **{name: plain[name][index] for name in _NUMBERS},
            token_ids=tokens,
            logprobs=_logprobs(tokens, lists, index) if has_logprobs[index] else None,
            finish_reason=plain["finish_reason"][index],
            error=None if error_type is None else RowError(row_id, error_type, error, attempts),
        )


def _logprobs(tokens: Tokens, lists: "dict[str, list[np.ndarray[Any, Any]]]", index: int) -> tuple[TokenLogprobs, ...]:
    ends = np.cumsum(lists["num_top"][index])
    pairs = list(zip(lists["top_ids"][index].tolist(), lists["top_logprobs"][index].tolist(), strict=True))
    return tuple(
        TokenLogprobs(token_id, logprob, tuple(pairs[start:end]))
        for token_id, logprob, start, end in zip(
            tokens.tolist(), lists["logprobs"][index].tolist(), chain((0,), ends[:-1]), ends, strict=True
        )
    )


def _metadata(origin: SegmentOrigin) -> dict[bytes, bytes]:
    return {
        b"batchinfer.format_version": str(FORMAT_VERSION).encode(),
        b"batchinfer.fingerprint": origin.fingerprint.encode(),
        b"batchinfer.unit_id": origin.unit_id.encode(),
        b"batchinfer.run_id": origin.run_id.encode(),
        b"batchinfer.lease": str(origin.lease).encode(),
    }


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_NUM_DIGEST_BYTES).digest()


def _lists(
    lengths: Sequence[int], values: "np.ndarray[Any, Any]", mask: pa.BooleanArray | None = None
) -> "pa.ListArray[Any]":
    """``values`` dealt out to lists of these lengths in order; null where the mask says so."""
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    return pa.ListArray.from_arrays(cast(pa.Int32Array, pa.array(starts)), pa.array(values), mask=mask)


def _slices(table: pa.Table, name: str) -> "list[np.ndarray[Any, Any]]":
    """One array per row of a list column, all of them views of one; empty for a null."""
    found: list[np.ndarray[Any, Any]] = []
    for chunk in table.column(name).chunks:
        lists = cast("pa.ListArray[Any]", chunk)
        values = lists.values.to_numpy(zero_copy_only=False)
        offsets = lists.offsets.to_numpy()
        found += [values[start:end] for start, end in pairwise(offsets)]
    return found
