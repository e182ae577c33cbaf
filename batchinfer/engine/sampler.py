"""From logits to next tokens, for a whole batch at once.

Each row's token is a pure function of (its logits, its SamplingParams, its stream key, its position): no
generator, no state shared between rows. The steps, in order, and where they come from (transformers 5):

0. Tokens that a row's mask does not allow (a grammar's, say) are impossible.
1. ``repetition_penalty`` on every token of prompt and completion (RepetitionPenaltyLogitsProcessor), then
   ``min_new_tokens``: stop ids are impossible below it (MinNewTokensLengthLogitsProcessor).
2. Greedy (temperature 0): the highest logit, the lowest id among equals. Done.
3. ``temperature`` divides. ``top_k`` keeps every token at least as likely as the k-th (TopKLogitsWarper).
   ``top_p`` keeps the smallest set of likeliest tokens whose share of what top_k left reaches top_p, the lower
   id first among equals (TopPLogitsWarper). ``min_p`` keeps tokens at least min_p times as likely as the
   likeliest (MinPLogitsWarper).
4. Inverse CDF over the kept tokens in the order of their ids, in float64, with the one uniform of the position.

Log-probabilities are those of the raw logits, before any of this. Where a row's tokens are forced, none of it matters:
the token is the one given for its position.

Shape suffixes: R rows of the batch, S rows that sample, V vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchinfer.engine.nucleus import cut_top_p
from batchinfer.engine.randomness import GOLDEN_GAMMA, MIX_1, MIX_2
from batchinfer.engine.token_masks import TokenMasks
from batchinfer.engine.upload import upload
from batchinfer.records import SamplingParams, TokenLogprobs

#: Elements of one float64 working tensor; more rows are drawn in turns. 4 MiB stay in a CPU's caches and are used again
#: by its allocator, which takes half of the time of larger ones; a GPU is busy with 64 MiB.
_MAX_DRAW_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift of int64; torch's own one copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def uniform(keys_S: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """``randomness.uniform`` for int64 tensors of keys (the bits of the uint64) and positions; float64 in [0, 1)."""
    bits = keys_S + (positions_S + 1) * _signed(GOLDEN_GAMMA)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(MIX_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(MIX_2)
    bits = bits ^ _shift_right(bits, 31)
    return _shift_right(bits, 11).double() * 2.0**-53


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the sampler knows of one sequence when it joins the batch."""

    params: SamplingParams
    key: int
    stop_ids: tuple[int, ...]
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    #: What the row takes, one per position, instead of what would be sampled; empty = it samples.
    forced: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's tokens: [R] on the device for the next forward pass, and on the host."""

    tokens: torch.Tensor
    token_ids: list[int]
    #: Per row, false when its logits hold NaN or +inf, or allow no token: the token means nothing then.
    is_finite: list[bool]
    #: By row, for those that asked.
    logprobs: dict[int, TokenLogprobs]


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities on their way to the host: (row, number of best tokens asked for), and tensors [S], [S, K]."""

    scored: tuple[tuple[int, int], ...]
    chosen_S: torch.Tensor
    top_values_SK: torch.Tensor
    top_ids_SK: torch.Tensor

    def by_row(self, token_ids: list[int]) -> dict[int, TokenLogprobs]:
        chosen, values, ids = self.chosen_S.tolist(), self.top_values_SK.tolist(), self.top_ids_SK.tolist()
        found: dict[int, TokenLogprobs] = {}
        for index, (row, k) in enumerate(self.scored):
            pairs = tuple(zip(ids[index][:k], values[index][:k], strict=True))
            found[row] = TokenLogprobs(token_id=token_ids[row], logprob=chosen[index], top=pairs)
        return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's tokens, on the device at once and on the host when the device is done."""

    tokens: torch.Tensor
    _facts_2R: torch.Tensor
    _scores: _Scores | None
    _done: torch.cuda.Event | None

    def fetch(self) -> Sampled:
        """Wait for the device, then read. May be repeated."""
        if self._done is not None:
            self._done.synchronize()
        token_ids, is_finite = self._facts_2R.tolist()
        logprobs = {} if self._scores is None else self._scores.by_row(token_ids)
        return Sampled(self.tokens, token_ids, [bool(flag) for flag in is_finite], logprobs)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory; from a GPU it is there only once the event after it has passed."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """A mark behind everything that was launched so far; None where nothing runs by itself."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class Sampler:
    """The sampling side of a batch: rows join and leave, every :meth:`sample` draws one token for each."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._device = device
        self._rows: list[SamplerRow] = []
        self._positions: list[int] = []
        self._seen_RV: torch.Tensor | None = None
        self._packed: _Packed | None = None

    def extend(self, rows: Sequence[SamplerRow]) -> None:
        """Rows join behind those present."""
        old = len(self._rows)
        self._rows.extend(rows)
        self._positions.extend(len(row.generated_ids) for row in rows)
        self._packed = None
        if any(row.params.repetition_penalty != 1.0 for row in self._rows):
            self._extend_seen(old)

    def select(self, order: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._rows = [self._rows[index] for index in order]
        self._positions = [self._positions[index] for index in order]
        self._packed = None
        if not any(row.params.repetition_penalty != 1.0 for row in self._rows):
            self._seen_RV = None
        elif self._seen_RV is not None:
            self._seen_RV = self._seen_RV[upload(order, torch.long, self._device)]

    def sample(self, logits_RV: torch.Tensor, masks: TokenMasks | None = None) -> Sampled:
        """Draw each row's next token and advance its position by one. ``logits_RV`` is not changed."""
        return self.launch(logits_RV, masks).fetch()

    def launch(self, logits_RV: torch.Tensor, masks: TokenMasks | None = None) -> "Drawn":
        """As :meth:`sample`, without waiting for the device: ``fetch`` waits, and may come a step later."""
        if self._packed is None:
            self._packed = _Packed.pack(self._rows, self._positions, self._device)
        packed = self._packed
        scores_RV = self._adjust(logits_RV if masks is None else masks.applied(logits_RV), packed)
        # The first of equals, as argmax gives, which takes four times as long over bfloat16 on a CPU.
        best_score_R, best_R = scores_RV.max(dim=-1)
        tokens_R = best_R
        if packed.drawn is not None:
            tokens_R = best_R.clone()
            tokens_R[packed.drawn] = self._draw(scores_RV, packed)
        if packed.forced is not None:
            tokens_R = packed.forced.put(tokens_R, packed.positions)
        if self._seen_RV is not None:
            self._seen_RV.scatter_(1, tokens_R[:, None], True)
        packed.positions.add_(1)
        self._positions = [position + 1 for position in self._positions]
        facts_2R = _to_host(torch.stack((tokens_R, best_score_R.isfinite().long())))
        return Drawn(tokens_R, facts_2R, self._score(logits_RV, tokens_R, packed), _event(self._device))

    def _adjust(self, logits_RV: torch.Tensor, packed: "_Packed") -> torch.Tensor:
        """Step 1; the logits themselves where no row needs it."""
        suppresses = packed.max_min_new_tokens > min(self._positions, default=0)
        if self._seen_RV is None and not suppresses:
            return logits_RV
        scores_RV = logits_RV.to(torch.float32, copy=True)
        if self._seen_RV is not None:
            penalty_R1 = packed.penalty[:, None]
            penalised_RV = torch.where(scores_RV < 0, scores_RV * penalty_R1, scores_RV / penalty_R1)
            scores_RV = torch.where(self._seen_RV, penalised_RV, scores_RV)
        if suppresses:
            suppressed = [
                (row, stop_id)
                for row, (facts, position) in enumerate(zip(self._rows, self._positions, strict=True))
                if position < facts.params.min_new_tokens
                for stop_id in facts.stop_ids
                if stop_id < self.vocab_size
            ]
            if suppressed:
                rows, ids = upload(suppressed, torch.long, self._device).T
                scores_RV.index_put_((rows, ids), scores_RV.new_full((), -torch.inf))
        return scores_RV

    def _draw(self, scores_RV: torch.Tensor, packed: "_Packed") -> torch.Tensor:
        assert packed.drawn is not None
        uniform_S = uniform(packed.keys, packed.positions[packed.drawn])
        chunk = max(1, _MAX_DRAW_ELEMENTS[scores_RV.device.type] // scores_RV.shape[1])
        return torch.cat(
            [
                draw(
                    scores_RV[packed.drawn[start : start + chunk]].float(),
                    packed.cuts[start : start + chunk],
                    packed.cut_columns[start : start + chunk],
                    uniform_S[start : start + chunk],
                )
                for start in range(0, len(packed.cuts), chunk)
            ]
        )

    def _score(self, logits_RV: torch.Tensor, tokens_R: torch.Tensor, packed: "_Packed") -> "_Scores | None":
        if packed.scored_rows is None:
            return None
        logprobs_SV = torch.log_softmax(logits_RV[packed.scored_rows].float(), dim=-1)
        chosen_S = logprobs_SV.gather(1, tokens_R[packed.scored_rows][:, None])[:, 0]
        top = logprobs_SV.topk(min(packed.max_top_logprobs, logprobs_SV.shape[1]), dim=-1)
        return _Scores(packed.scored, _to_host(chosen_S), _to_host(top.values), _to_host(top.indices))

    def _extend_seen(self, old: int) -> None:
        """Mark the joined rows' tokens; rows without a penalty stay unmarked (their penalty of 1 changes nothing)."""
        seen_RV = torch.zeros(len(self._rows), self.vocab_size, dtype=torch.bool, device=self._device)
        if self._seen_RV is not None:
            seen_RV[:old] = self._seen_RV
        marks: list[tuple[int, int]] = []
        for index, row in enumerate(self._rows[old:], start=old):
            if row.params.repetition_penalty != 1.0:
                marks += ((index, token_id) for token_id in {*row.prompt_ids, *row.generated_ids})
        if marks:
            rows, ids = upload(marks, torch.long, self._device).T
            seen_RV.index_put_((rows, ids), seen_RV.new_ones(()))
        self._seen_RV = seen_RV


@dataclass(frozen=True, slots=True)
class Cuts:
    """One sampling row's parameters on the host, where they decide which work is needed at all."""

    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class _Forced:
    """Rows whose tokens are given, [F], and their tokens by position, [F, T], padded with zeros."""

    rows: torch.Tensor
    tokens_FT: torch.Tensor

    @classmethod
    def pack(cls, rows: Sequence[SamplerRow], device: torch.device) -> "_Forced | None":
        forced = [(index, row.forced) for index, row in enumerate(rows) if row.forced]
        if not forced:
            return None
        longest = max(len(tokens) for _, tokens in forced)
        padded = [[*tokens, *[0] * (longest - len(tokens))] for _, tokens in forced]
        return cls(upload([index for index, _ in forced], torch.long, device), upload(padded, torch.long, device))

    def put(self, tokens_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """``tokens_R`` with the forced rows' own tokens; a row beyond its last one gets anything."""
        places_F1 = positions_R[self.rows][:, None].clamp(max=self.tokens_FT.shape[1] - 1)
        return tokens_R.index_copy(0, self.rows, self.tokens_FT.gather(1, places_F1)[:, 0])


@dataclass(frozen=True, slots=True)
class _Packed:
    """The rows' parameters as tensors, made once per composition of the batch."""

    #: Of all rows, [R].
    penalty: torch.Tensor
    positions: torch.Tensor
    max_min_new_tokens: int
    #: Rows with a temperature, [S]; None when there are none. The next three are theirs.
    drawn: torch.Tensor | None
    keys: torch.Tensor
    cuts: tuple[Cuts, ...]
    #: float64 [S, 4]: temperature, top_k, top_p, min_p.
    cut_columns: torch.Tensor
    #: (row, number of best tokens asked for); rows that asked for log-probabilities.
    scored: tuple[tuple[int, int], ...]
    scored_rows: torch.Tensor | None
    max_top_logprobs: int
    #: None when every row samples.
    forced: _Forced | None

    @classmethod
    def pack(cls, rows: Sequence[SamplerRow], positions: Sequence[int], device: torch.device) -> "_Packed":
        params = [row.params for row in rows]
        drawing = [index for index, p in enumerate(params) if p.temperature > 0.0]
        scored = tuple((index, p.logprobs) for index, p in enumerate(params) if p.logprobs is not None)
        return cls(
            penalty=upload([p.repetition_penalty for p in params], torch.float32, device),
            positions=upload(positions, torch.long, device),
            max_min_new_tokens=max((p.min_new_tokens for p in params), default=0),
            drawn=upload(drawing, torch.long, device) if drawing else None,
            keys=upload([_signed(rows[index].key) for index in drawing], torch.long, device),
            cuts=tuple(Cuts(params[i].top_k, params[i].top_p, params[i].min_p) for i in drawing),
            cut_columns=upload(
                [[params[i].temperature, params[i].top_k, params[i].top_p, params[i].min_p] for i in drawing],
                torch.float64,
                device,
            ).reshape(len(drawing), 4),
            scored=scored,
            scored_rows=upload([row for row, _ in scored], torch.long, device) if scored else None,
            max_top_logprobs=max((k for _, k in scored), default=0),
            forced=_Forced.pack(rows, device),
        )


def draw(scores_SV: torch.Tensor, cuts: Sequence[Cuts], cuts_S4: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """Steps 3 and 4 for rows with a temperature: float32 scores and one uniform each -> token ids [S]."""
    weights_SV = keep_weights(scores_SV, cuts, cuts_S4)
    cdf_SV = weights_SV.cumsum(dim=-1)
    total_S = cdf_SV[:, -1]
    # uniform * total may round up to total; one step below it, the search ends on a kept token for certain.
    target_S = torch.minimum(uniform_S * total_S, torch.nextafter(total_S, torch.zeros_like(total_S)))
    token_S = torch.searchsorted(cdf_SV, target_S[:, None], right=True)[:, 0]
    # Only logits of NaN reach past the end; the caller reports such a row, the index must merely exist.
    return token_S.clamp(max=scores_SV.shape[1] - 1)


def keep_weights(scores_SV: torch.Tensor, cuts: Sequence[Cuts], cuts_S4: torch.Tensor) -> torch.Tensor:
    """Unnormalised float64 probabilities after every cut, 1 for the likeliest token and 0 for those cut off."""
    best_S1 = scores_SV.amax(dim=-1, keepdim=True)
    weights_SV = torch.exp((scores_SV.double() - best_S1.double()) / cuts_S4[:, 0:1])
    vocab_size = scores_SV.shape[1]
    with_top_k = [index for index, cut in enumerate(cuts) if 0 < cut.top_k < vocab_size]
    if with_top_k:
        rows = upload(with_top_k, torch.long, scores_SV.device)
        values = scores_SV[rows].topk(max(cuts[index].top_k for index in with_top_k), dim=-1).values
        threshold = values.gather(1, cuts_S4[rows, 1].long()[:, None] - 1)
        weights_SV[rows] = torch.where(scores_SV[rows] >= threshold, weights_SV[rows], 0.0)
    with_top_p = [index for index, cut in enumerate(cuts) if cut.top_p < 1.0]
    if with_top_p:
        rows = upload(with_top_p, torch.long, scores_SV.device)
        weights_SV[rows] = cut_top_p(weights_SV[rows], cuts_S4[rows, 2])
    if any(cut.min_p > 0.0 for cut in cuts):
        weights_SV = torch.where(weights_SV >= cuts_S4[:, 3:4], weights_SV, 0.0)
    return weights_SV
