"""A step plan as tensors on the device: two transfers a step, whatever it carries.

The tokens of a step are the decode rows' newest tokens in the plan's order, then the tokens of its prefill chunks.
Tensor suffixes are those of ``ops.py``; further R decode rows, C chunks, G prefix groups, S tokens that sample.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk, StepPlan

#: ``tokens_of(holder, start, stop)``: the token ids of a holder's positions ``start .. stop - 1``.
TokensOf = Callable[[int, int, int], SequenceOf[int]]

_Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """The decode rows that share a prefix, group by group; rows whose prefixes begin at one place share all of it.

    Group g consists of the rows ``rows_M[starts_G1[g] : starts_G1[g + 1]]`` (indices into R) and shares the
    ``lengths_G[g]`` places from ``offsets_G[g]`` on. Rows without a prefix are in no group. All int32, on the device.
    """

    rows_M: torch.Tensor
    starts_G1: torch.Tensor
    offsets_G: torch.Tensor
    lengths_G: torch.Tensor
    max_rows: int
    max_length: int

    @property
    def num_groups(self) -> int:
        return int(self.offsets_G.shape[0])


@dataclass(frozen=True, slots=True)
class DecodeTensors:
    """Where the KV of each decode row lies; int32 tensors on the device, numbers on the host.

    ``lengths_R`` counts a row's own tokens, the one of this step included; its position is
    ``prefix_lengths_R + lengths_R - 1``. ``groups`` is None where no row has a prefix.
    """

    offsets_R: torch.Tensor
    lengths_R: torch.Tensor
    prefix_offsets_R: torch.Tensor
    prefix_lengths_R: torch.Tensor
    groups: PrefixGroups | None
    max_length: int

    @property
    def num_rows(self) -> int:
        return int(self.offsets_R.shape[0])


@dataclass(frozen=True, slots=True)
class ChunkTensors:
    """The prefill chunks of a step; int32 tensors on the device, the chunks themselves and numbers on the host.

    Queries of chunk c are rows ``cu_queries_C1[c] .. cu_queries_C1[c + 1] - 1`` of the chunks' tokens and stand at
    positions from ``starts_C[c]`` on. ``lengths_C`` counts own tokens in the cache once the chunk is written.
    """

    cu_queries_C1: torch.Tensor
    starts_C: torch.Tensor
    offsets_C: torch.Tensor
    lengths_C: torch.Tensor
    prefix_offsets_C: torch.Tensor
    prefix_lengths_C: torch.Tensor
    chunks: tuple[PrefillChunk, ...]
    max_queries: int
    max_length: int
    max_prefix_length: int


@dataclass(frozen=True, slots=True)
class CopyTensors:
    """Places to copy before anything else of the step, token by token; int64 on the device."""

    sources_M: torch.Tensor
    targets_M: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One forward pass. ``tokens_T``, ``positions_T``, ``places_T`` are int64; ``num_decode`` come from decode rows.

    ``logits_rows_S`` (int64) are the tokens after which one is sampled: every decode row, then the last token of
    each sampling chunk, in the plan's order; None means all tokens.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    places_T: torch.Tensor
    num_decode: int
    decode: DecodeTensors | None
    chunks: ChunkTensors | None
    logits_rows_S: torch.Tensor | None
    copies: CopyTensors | None


def build(
    plan: StepPlan, tokens_of: TokensOf, device: torch.device, newest_tokens_R: torch.Tensor | None = None
) -> StepTensors:
    """The tensors of one plan on ``device``.

    ``newest_tokens_R`` (int64, on the device) are the decode rows' tokens where the host does not know them yet,
    because the step that samples them is still running; without it ``tokens_of`` is asked for them too. The host
    never waits for the device here.
    """
    wide, narrow = _Packer(np.int64, device), _Packer(np.int32, device)
    num_decode, num_tokens = len(plan.decode), plan.num_tokens
    rows = _decode_columns(plan.decode)
    token_ids = np.zeros(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    places = np.empty(num_tokens, np.int64)
    positions[:num_decode] = rows.positions
    places[:num_decode] = rows.offsets + rows.positions - rows.prefix_lengths
    if newest_tokens_R is None:
        for index, row in enumerate(plan.decode):
            token_ids[index] = tokens_of(row.sequence, row.position, row.position + 1)[0]
    sampling = list(range(num_decode))
    first = num_decode
    for chunk in plan.prefill:
        end = first + chunk.num_tokens
        token_ids[first:end] = tokens_of(chunk.holder, chunk.start, chunk.stop)
        positions[first:end] = np.arange(chunk.start, chunk.stop)
        places[first:end] = positions[first:end] + (chunk.offset - chunk.prefix_length)
        if chunk.samples:
            sampling.append(end - 1)
        first = end
    for column in (token_ids, positions, places):
        wide.add(column)
    wide.add(np.array(sampling if len(sampling) < num_tokens else (), np.int64))
    _add_copies(wide, plan.copies)
    tokens_T, positions_T, places_T, sampling_S, sources_M, targets_M = wide.tensors()
    if newest_tokens_R is not None:
        tokens_T[:num_decode] = newest_tokens_R
    groups = _groups(rows)
    _add_decode(narrow, rows, groups)
    _add_chunks(narrow, plan.prefill)
    parts = narrow.tensors()
    return StepTensors(
        tokens_T=tokens_T,
        positions_T=positions_T,
        places_T=places_T,
        num_decode=num_decode,
        decode=_decode_tensors(parts[:8], rows, groups) if plan.decode else None,
        chunks=_chunk_tensors(parts[8:], plan.prefill) if plan.prefill else None,
        logits_rows_S=sampling_S if len(sampling) < num_tokens else None,
        copies=CopyTensors(sources_M, targets_M) if plan.copies else None,
    )


class _Packer:
    """Integer arrays that travel to the device as one."""

    def __init__(self, dtype: type[np.int64] | type[np.int32], device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._arrays: list[_Ints] = []

    def add(self, array: _Ints) -> None:
        self._arrays.append(array)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What was added, in that order, as views of one tensor."""
        packed = torch.from_numpy(np.concatenate(self._arrays, dtype=self._dtype))
        if self._device.type == "cuda":
            # Pinned memory is what makes the copy asynchronous; torch keeps the page until the copy is done.
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        ends = np.cumsum([len(array) for array in self._arrays]).tolist()
        return tuple(packed[end - len(array) : end] for end, array in zip(ends, self._arrays, strict=True))


@dataclass(frozen=True, slots=True)
class _DecodeColumns:
    positions: _Ints
    offsets: _Ints
    prefix_offsets: _Ints
    prefix_lengths: _Ints

    @property
    def lengths(self) -> _Ints:
        return self.positions + 1 - self.prefix_lengths


def _decode_columns(rows: SequenceOf[DecodeRow]) -> _DecodeColumns:
    # A row is a tuple of its fields in this order.
    _, positions, offsets, prefix_offsets, prefix_lengths = np.array(rows, np.int64).reshape(-1, 5).T
    return _DecodeColumns(positions, offsets, prefix_offsets, prefix_lengths)


@dataclass(frozen=True, slots=True)
class _GroupColumns:
    rows: _Ints
    starts: _Ints
    offsets: _Ints
    lengths: _Ints


def _groups(rows: _DecodeColumns) -> _GroupColumns:
    """Rows with a prefix, sorted by where it lies; rows of one prefix keep the plan's order."""
    sharing = np.nonzero(rows.prefix_lengths)[0]
    members = sharing[np.argsort(rows.prefix_offsets[sharing], kind="stable")]
    _, firsts = np.unique(rows.prefix_offsets[members], return_index=True)
    return _GroupColumns(
        rows=members,
        starts=np.append(firsts, len(members)),
        offsets=rows.prefix_offsets[members[firsts]],
        lengths=rows.prefix_lengths[members[firsts]],
    )


def _add_copies(wide: _Packer, copies: SequenceOf[Copy]) -> None:
    none = np.empty(0, np.int64)
    wide.add(np.concatenate([none, *(np.arange(copy.source, copy.source + copy.num_tokens) for copy in copies)]))
    wide.add(np.concatenate([none, *(np.arange(copy.target, copy.target + copy.num_tokens) for copy in copies)]))


def _add_decode(narrow: _Packer, rows: _DecodeColumns, groups: _GroupColumns) -> None:
    for column in (rows.offsets, rows.lengths, rows.prefix_offsets, rows.prefix_lengths):
        narrow.add(column)
    for column in (groups.rows, groups.starts, groups.offsets, groups.lengths):
        narrow.add(column)


def _decode_tensors(parts: SequenceOf[torch.Tensor], rows: _DecodeColumns, groups: _GroupColumns) -> DecodeTensors:
    sharing = None
    if len(groups.offsets):
        sharing = PrefixGroups(
            rows_M=parts[4],
            starts_G1=parts[5],
            offsets_G=parts[6],
            lengths_G=parts[7],
            max_rows=int(np.diff(groups.starts).max()),
            max_length=int(groups.lengths.max()),
        )
    return DecodeTensors(
        offsets_R=parts[0],
        lengths_R=parts[1],
        prefix_offsets_R=parts[2],
        prefix_lengths_R=parts[3],
        groups=sharing,
        max_length=int(rows.lengths.max()),
    )


def _add_chunks(narrow: _Packer, chunks: SequenceOf[PrefillChunk]) -> None:
    narrow.add(np.cumsum([0, *(chunk.num_tokens for chunk in chunks)]))
    table = np.array(
        [
            (chunk.start, chunk.offset, chunk.stop - chunk.prefix_length, chunk.prefix_offset, chunk.prefix_length)
            for chunk in chunks
        ],
        np.int64,
    ).reshape(-1, 5)
    for column in table.T:
        narrow.add(column)


def _chunk_tensors(parts: SequenceOf[torch.Tensor], chunks: SequenceOf[PrefillChunk]) -> ChunkTensors:
    return ChunkTensors(
        cu_queries_C1=parts[0],
        starts_C=parts[1],
        offsets_C=parts[2],
        lengths_C=parts[3],
        prefix_offsets_C=parts[4],
        prefix_lengths_C=parts[5],
        chunks=tuple(chunks),
        max_queries=max(chunk.num_tokens for chunk in chunks),
        max_length=max(chunk.stop - chunk.prefix_length for chunk in chunks),
        max_prefix_length=max(chunk.prefix_length for chunk in chunks),
    )
