"""Pure decode steps as captured graphs: one launch instead of the several hundred of an eager step.

A graph is a recording of launches with their addresses and grids, so its inputs live in tensors of a fixed size,
which every replay finds filled anew, and a step is padded to the next recorded number of rows. Padding rows read and
write one place of the arena that belongs to nobody. Steps with prefill are long enough to hide their launches: they
run eagerly, as do decode steps whose prefix groups are more than a graph has room for.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.engine.kv_cache import KvCache
from batchinfer.engine.step_tensors import DecodeTensors, PrefixGroups, StepTensors

__all__ = ["GraphedDecoder", "Record", "Replay", "cuda_recorder", "graph_sizes"]

#: Prefix groups a graph has room for; the kernels look through so many with one and the same code.
_MAX_GROUPS = 64
#: What a graph's launches are cut for; longer rows are right too, their work is only less well spread.
_TYPICAL_LENGTH = 2048

#: Runs what it recorded again, on whatever its input tensors hold by now.
Replay = Callable[[], None]


class Record(Protocol):
    """Records a step: runs ``step`` and gives its output, which every call of the replay overwrites."""

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Replay]: ...


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph of their own: padding costs an eighth of a step's rows at most from 8 rows on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_rows:
        # Between two powers of two, eight steps of equal width, none below 8 rows.
        step = max(8, 1 << max(0, sizes[-1].bit_length() - 1 - 3))
        sizes.append(sizes[-1] + step)
    return (*(size for size in sizes if size < max_rows), max_rows)


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded step, the tensors it reads and the logits it writes."""

    inputs: StepTensors
    logits_RV: torch.Tensor
    replay: Replay


class GraphedDecoder:
    """A :class:`Decoder` whose pure decode steps are replayed; the same results, sooner.

    Bound to one KV cache, whose last place it uses for padding: the scheduler must not know of that place.
    """

    def __init__(self, decoder: Decoder, kv: KvCache, max_rows: int, record: Record) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sizes = graph_sizes(max_rows)
        self._record = record
        #: By number of rows and whether rows share prefixes; made when a step first asks for one.
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    @property
    def config(self) -> DecoderConfig:
        return self._decoder.config

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def forward(self, step: StepTensors, kv: KvCache) -> torch.Tensor:
        """As :meth:`Decoder.forward`; the logits of a replayed step are overwritten by the next one of its size."""
        decode = step.decode
        if kv is not self._kv or decode is None or step.chunks is not None or decode.num_rows > self._sizes[-1]:
            return self._decoder.forward(step, kv)
        if decode.groups is not None and decode.groups.num_groups > _MAX_GROUPS:
            return self._decoder.forward(step, kv)
        if step.copies is not None:
            self._decoder.copy(step.copies, kv)
        num_rows = decode.num_rows
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        key = (size, decode.groups is not None)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(size, decode.groups is not None)
        self._fill(graph.inputs, step, decode)
        graph.replay()
        return graph.logits_RV[:num_rows]

    def _capture(self, num_rows: int, has_groups: bool) -> _Graph:
        inputs = _empty_step(num_rows, has_groups, self.device)
        self._pad(inputs, 0)
        logits_RV, replay = self._record(lambda: self._decoder.forward(inputs, self._kv))
        return _Graph(inputs, logits_RV, replay)

    def _pad(self, inputs: StepTensors, num_rows: int) -> None:
        """Make all rows from ``num_rows`` on padding: one token at the place that belongs to nobody."""
        nobodys = self._kv.num_places - 1
        decode = inputs.decode
        assert decode is not None
        inputs.tokens_T[num_rows:] = 0
        inputs.positions_T[num_rows:] = 0
        inputs.places_T[num_rows:] = nobodys
        decode.offsets_R[num_rows:] = nobodys
        decode.lengths_R[num_rows:] = 1
        decode.prefix_offsets_R[num_rows:] = 0
        decode.prefix_lengths_R[num_rows:] = 0

    def _fill(self, inputs: StepTensors, step: StepTensors, live: DecodeTensors) -> None:
        num_rows = live.num_rows
        decode = inputs.decode
        assert decode is not None
        for target, source in (
            (inputs.tokens_T, step.tokens_T),
            (inputs.positions_T, step.positions_T),
            (inputs.places_T, step.places_T),
            (decode.offsets_R, live.offsets_R),
            (decode.lengths_R, live.lengths_R),
            (decode.prefix_offsets_R, live.prefix_offsets_R),
            (decode.prefix_lengths_R, live.prefix_lengths_R),
        ):
            target[:num_rows].copy_(source)
        self._pad(inputs, num_rows)
        if decode.groups is not None and live.groups is not None:
            _fill_groups(decode.groups, live.groups)


def _empty_step(num_rows: int, has_groups: bool, device: torch.device) -> StepTensors:
    def wide(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64, device=device)

    def narrow(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    groups = None
    if has_groups:
        groups = PrefixGroups(
            rows_M=narrow(num_rows),
            starts_G1=narrow(_MAX_GROUPS + 1),
            offsets_G=narrow(_MAX_GROUPS),
            lengths_G=narrow(_MAX_GROUPS),
            max_rows=num_rows,
            max_length=_TYPICAL_LENGTH,
        )
    return StepTensors(
        tokens_T=wide(num_rows),
        positions_T=wide(num_rows),
        places_T=wide(num_rows),
        num_decode=num_rows,
        decode=DecodeTensors(
            offsets_R=narrow(num_rows),
            lengths_R=narrow(num_rows),
            prefix_offsets_R=narrow(num_rows),
            prefix_lengths_R=narrow(num_rows),
            groups=groups,
            max_length=_TYPICAL_LENGTH,
        ),
        chunks=None,
        logits_rows_S=None,
        copies=None,
    )


def _fill_groups(target: PrefixGroups, source: PrefixGroups) -> None:
    """Groups behind the live ones are empty: they begin and end where the last live one ends."""
    num_groups, num_members = source.num_groups, source.rows_M.shape[0]
    target.rows_M[:num_members].copy_(source.rows_M)
    target.starts_G1[: num_groups + 1].copy_(source.starts_G1)
    target.starts_G1[num_groups + 1 :] = num_members
    target.offsets_G[:num_groups].copy_(source.offsets_G)
    target.lengths_G[:num_groups].copy_(source.lengths_G)
    target.lengths_G[num_groups:] = 0


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs, which share one pool of memory: they run one after the other, never at once."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Replay]:
        # The first run compiles kernels and makes the libraries take their workspaces, which no capture may contain.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads pin and copy memory meanwhile, which would spoil a capture that watches all of them.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = step()
        return output, graph.replay

    return record
