"""A plan as tensors: which token is where, what is sampled, what the device is told."""

import torch

from batchinfer.engine import step_tensors
from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk, StepPlan

CPU = torch.device("cpu")


def tokens_of(holder: int, start: int, stop: int) -> list[int]:
    return [1000 * holder + position for position in range(start, stop)]


PLAN = StepPlan(
    copies=(Copy(5, 40, 3), Copy(90, 2, 2)),
    decode=(DecodeRow(7, 12, 100, 300, 8), DecodeRow(8, 4, 20), DecodeRow(9, 9, 60, 300, 8)),
    prefill=(PrefillChunk(1, 0, 3, 200, False), PrefillChunk(2, 10, 12, 240, True, 300, 8)),
)


def test_tokens_positions_and_places_follow_the_plan() -> None:
    step = step_tensors.build(PLAN, tokens_of, CPU)
    assert step.tokens_T.tolist() == [7012, 8004, 9009, 1000, 1001, 1002, 2010, 2011]
    assert step.positions_T.tolist() == [12, 4, 9, 0, 1, 2, 10, 11]
    assert step.places_T.tolist() == [104, 24, 61, 200, 201, 202, 242, 243]
    assert step.num_decode == 3
    assert step.logits_rows_S is not None
    assert step.logits_rows_S.tolist() == [0, 1, 2, 7]


def test_rows_say_where_their_own_and_their_shared_tokens_lie() -> None:
    decode = step_tensors.build(PLAN, tokens_of, CPU).decode
    assert decode is not None
    assert decode.num_rows == 3
    assert decode.offsets_R.tolist() == [100, 20, 60]
    assert decode.lengths_R.tolist() == [5, 5, 2]
    assert decode.prefix_offsets_R.tolist() == [300, 0, 300]
    assert decode.prefix_lengths_R.tolist() == [8, 0, 8]
    assert decode.max_length == 5
    assert decode.offsets_R.dtype == torch.int32


def test_rows_with_one_prefix_form_a_group() -> None:
    rows = [(1, 500, 32), (2, 0, 0), (3, 64, 16), (4, 500, 32), (5, 500, 32)]
    plan = StepPlan((), tuple(DecodeRow(s, 40, 100 * s, *prefix) for s, *prefix in rows), ())
    decode = step_tensors.build(plan, tokens_of, CPU).decode
    assert decode is not None
    groups = decode.groups
    assert groups is not None
    assert groups.num_groups == 2
    assert groups.rows_M.tolist() == [2, 0, 3, 4]
    assert groups.starts_G1.tolist() == [0, 1, 4]
    assert groups.offsets_G.tolist() == [64, 500]
    assert groups.lengths_G.tolist() == [16, 32]
    assert (groups.max_rows, groups.max_length) == (3, 32)


def test_chunks_say_where_their_context_lies() -> None:
    chunks = step_tensors.build(PLAN, tokens_of, CPU).chunks
    assert chunks is not None
    assert chunks.cu_queries_C1.tolist() == [0, 3, 5]
    assert chunks.starts_C.tolist() == [0, 10]
    assert chunks.offsets_C.tolist() == [200, 240]
    assert chunks.lengths_C.tolist() == [3, 4]
    assert chunks.prefix_offsets_C.tolist() == [0, 300]
    assert chunks.prefix_lengths_C.tolist() == [0, 8]
    assert (chunks.max_queries, chunks.max_length, chunks.max_prefix_length) == (3, 4, 8)


def test_copies_are_spelled_out_place_by_place() -> None:
    copies = step_tensors.build(PLAN, tokens_of, CPU).copies
    assert copies is not None
    assert copies.sources_M.tolist() == [5, 6, 7, 90, 91]
    assert copies.targets_M.tolist() == [40, 41, 42, 2, 3]


def test_a_step_of_decode_rows_alone_samples_after_every_token() -> None:
    step = step_tensors.build(StepPlan((), PLAN.decode[1:2], ()), tokens_of, CPU)
    assert step.logits_rows_S is None
    assert step.chunks is None
    assert step.copies is None
    assert step.decode is not None
    assert step.decode.groups is None


def test_newest_tokens_may_come_from_the_device() -> None:
    """The host does not know them yet: it must not be asked."""

    def chunks_only(holder: int, start: int, stop: int) -> list[int]:
        assert holder < 7
        return tokens_of(holder, start, stop)

    step = step_tensors.build(PLAN, chunks_only, CPU, newest_tokens_R=torch.tensor([11, 12, 13]))
    assert step.tokens_T.tolist() == [11, 12, 13, 1000, 1001, 1002, 2010, 2011]
