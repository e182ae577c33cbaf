"""The torch paths against a softmax taken row by row, and the elementwise functions against transformers' own."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from batchinfer.engine import attention, step_tensors
from batchinfer.engine.step_plan import DecodeRow, PrefillChunk, StepPlan
from batchinfer.engine.step_tensors import StepTensors
from batchinfer.engine.torch_ops import TorchOps

CPU = torch.device("cpu")
NUM_PLACES, HEAD_DIM = 1024, 8
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Holder:
    """A sequence of ``length`` tokens; ``prefix`` is (offset, length) of what it shares."""

    offset: int
    length: int
    prefix: tuple[int, int] = (0, 0)

    def places(self) -> torch.Tensor:
        begin, shared = self.prefix
        own = torch.arange(self.offset, self.offset + self.length - shared)
        return torch.cat((torch.arange(begin, begin + shared), own))


def naive(
    q_HD: torch.Tensor,
    position: int,
    holder: Holder,
    arenas: tuple[torch.Tensor, torch.Tensor],
    soft_cap: float,
    window: int,
) -> torch.Tensor:
    """One query in float64, one head at a time."""
    keys, values = (arena[holder.places()[: position + 1]].double() for arena in arenas)
    num_groups = q_HD.shape[0] // keys.shape[1]
    outs = []
    for head, q in enumerate(q_HD.double()):
        scores = keys[:, head // num_groups] @ q * SCALE
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if window:
            scores[: max(0, position - window + 1)] = float("-inf")
        outs.append(scores.softmax(0) @ values[:, head // num_groups])
    return torch.stack(outs).float()


def arenas(num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, NUM_PLACES, num_kv_heads, HEAD_DIM, generator=generator)
    return keys, values


def tensors(decode: list[DecodeRow], prefill: list[PrefillChunk]) -> StepTensors:
    plan = StepPlan((), tuple(decode), tuple(prefill))
    return step_tensors.build(plan, lambda _, start, stop: [0] * (stop - start), CPU)


@st.composite
def holders(draw: st.DrawFn) -> list[Holder]:
    """Sequences one behind the other behind two prefixes, some with places of nobody between them."""
    granule = draw(st.sampled_from([32, 16, 4, 1]))
    prefixes = [(0, 0), (0, draw(st.integers(1, 40))), (48, draw(st.integers(1, 40)))]
    offset = 96 + draw(st.integers(0, 3)) * granule
    made = []
    for own in draw(st.lists(st.integers(1, 70), min_size=1, max_size=10)):
        prefix = draw(st.sampled_from(prefixes))
        made.append(Holder(offset, own + prefix[1], prefix))
        offset += -(-own // granule) * granule
    return made


OPTIONS = st.fixed_dictionaries(
    {"soft_cap": st.sampled_from([0.0, 2.0]), "window": st.sampled_from([0, 1, 7, 33, 500])}
)
SHAPES = st.sampled_from([(1, 1), (2, 3), (3, 1)])


@settings(max_examples=60, deadline=None)
@given(holders(), OPTIONS, SHAPES)
def test_decode_attention_is_a_softmax_per_row(
    sequences: list[Holder], options: dict[str, float], shape: tuple[int, int]
) -> None:
    num_kv_heads, num_groups = shape
    keys, values = arenas(num_kv_heads)
    rows = [DecodeRow(i, h.length - 1, h.offset, *h.prefix) for i, h in enumerate(sequences)]
    q_RHD = torch.randn(len(rows), num_kv_heads * num_groups, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    decode = tensors(rows, []).decode
    assert decode is not None
    soft_cap, window = options["soft_cap"], int(options["window"])
    out = TorchOps().decode_attention(q_RHD, keys, values, decode, SCALE, soft_cap, window)
    for index, holder in enumerate(sequences):
        expected = naive(q_RHD[index], holder.length - 1, holder, (keys, values), soft_cap, window)
        torch.testing.assert_close(out[index], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(holders(), OPTIONS, SHAPES, st.data())
def test_prefill_attention_is_a_softmax_per_query(
    sequences: list[Holder], options: dict[str, float], shape: tuple[int, int], choice: st.DataObject
) -> None:
    num_kv_heads, num_groups = shape
    keys, values = arenas(num_kv_heads)
    chunks = []
    for index, holder in enumerate(sequences[:4]):
        start = choice.draw(st.integers(holder.prefix[1], holder.length - 1))
        chunks.append(PrefillChunk(index, start, holder.length, holder.offset, True, *holder.prefix))
    step = tensors([], chunks)
    assert step.chunks is not None
    q_THD = torch.randn(len(step.tokens_T), num_kv_heads * num_groups, HEAD_DIM)
    soft_cap, window = options["soft_cap"], int(options["window"])
    out = TorchOps().prefill_attention(q_THD, keys, values, step.chunks, SCALE, soft_cap, window)
    row = 0
    for chunk in chunks:
        for position in range(chunk.start, chunk.stop):
            expected = naive(q_THD[row], position, sequences[chunk.holder], (keys, values), soft_cap, window)
            torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
            row += 1
    assert row == len(out)


@pytest.mark.parametrize("window", [0, 40])
def test_long_chunks_go_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(attention, "_BLOCK_QUERIES", 32)
    keys, values = arenas(2)
    step = tensors([], [PrefillChunk(0, 21, 150, 320, False, 16, 21)])
    assert step.chunks is not None
    q_THD = torch.randn(129, 4, HEAD_DIM)
    assert len(attention.prefill_layout(step.chunks, 2, window, q_THD)[0].blocks) == 5
    out = TorchOps().prefill_attention(q_THD, keys, values, step.chunks, SCALE, 0.0, window)
    for row in range(0, 129, 8):
        expected = naive(q_THD[row], 21 + row, Holder(320, 150, (16, 21)), (keys, values), 0.0, window)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)


def test_a_row_at_the_arenas_end_reads_nothing_behind_it() -> None:
    """Beside a longer row it is padded, with its own last place."""
    keys, values = arenas(2)
    ends = [Holder(NUM_PLACES - 32, 32), Holder(0, 63)]
    decode = tensors([DecodeRow(i, h.length - 1, h.offset) for i, h in enumerate(ends)], []).decode
    assert decode is not None
    (batch,) = attention.decode_layout(decode, keys, 0).groups[0].batches
    last = NUM_PLACES - 1
    assert batch.places_Z.view(2, 2, 64)[0, 1].tolist() == [2 * min(NUM_PLACES - 32 + i, last) for i in range(64)]
    q_RHD = torch.randn(2, 2, HEAD_DIM)
    out = TorchOps().decode_attention(q_RHD, keys, values, decode, SCALE, 0.0, 0)
    for index, holder in enumerate(ends):
        expected = naive(q_RHD[index], holder.length - 1, holder, (keys, values), 0.0, 0)
        torch.testing.assert_close(out[index], expected, atol=1e-5, rtol=1e-5)


def test_a_window_leaves_hidden_places_out_of_the_gather() -> None:
    keys, _ = arenas(2)
    decode = tensors([DecodeRow(0, 499, 16)], []).decode
    assert decode is not None
    (batch,) = attention.decode_layout(decode, keys, 20).groups[0].batches
    assert batch.length == 32
    assert attention.decode_layout(decode, keys, 0).groups[0].batches[0].length == 512


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300), st.sampled_from([0, 512]), st.sampled_from([64, 2048]))
def test_batches_take_every_row_once_and_never_cut_it(lengths: list[int], num_shared: int, place_bytes: int) -> None:
    lengths.sort(reverse=True)
    first = 0
    for num_rows, padded in attention.batch_sizes(lengths, num_shared, place_bytes):
        assert padded >= lengths[first]
        assert padded - lengths[first] < 32
        assert num_rows == 1 or num_rows * padded * place_bytes <= 3 << 19
        first += num_rows
    assert first == len(lengths)


def test_rows_of_one_length_share_a_batch() -> None:
    assert attention.batch_sizes([60] * 64, 0, 384) == [(64, 64)]
    assert attention.batch_sizes([1000, 20, 20], 0, 384) == [(1, 1024), (2, 32)]
    # Keys of twice as many bytes are worth another batch sooner, and fill one with fewer rows.
    assert attention.batch_sizes([320, 20, 20], 0, 384) == [(3, 320)]
    assert attention.batch_sizes([320, 20, 20], 0, 768) == [(1, 320), (2, 32)]
    assert attention.batch_sizes([60] * 64, 0, 768) == [(32, 64), (32, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_delta", [True, False])
def test_norms_round_as_transformers_does(dtype: torch.dtype, with_delta: bool) -> None:
    residual, delta = torch.randn(2, 5, 32).to(dtype)
    weight = torch.randn(32).to(dtype)
    total = residual + delta if with_delta else residual.clone()
    for unit_offset, norm in ((0.0, LlamaRMSNorm(32, 1e-5)), (1.0, Gemma2RMSNorm(32, 1e-5))):
        norm.to(dtype).weight.data.copy_(weight)
        before = weight.clone()
        kept, normed = TorchOps().add_rms_norm(
            residual.clone(), delta if with_delta else None, weight, 1e-5, unit_offset
        )
        assert torch.equal(kept, total)
        assert torch.equal(normed, norm(total).detach())
        assert torch.equal(weight, before)


@pytest.mark.parametrize("columns", [HEAD_DIM, 6])
def test_rotation_and_write_put_every_head_in_its_place(columns: int) -> None:
    num_heads, num_kv_heads, num_tokens = 4, 2, 5
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * HEAD_DIM)
    positions, places = torch.tensor([0, 3, 9, 2, 7]), torch.tensor([4, 900, 0, 17, 18])
    angles = torch.arange(16.0)[:, None] * torch.rand(columns // 2)
    keys, values = arenas(num_kv_heads)
    untouched = keys.clone()
    q = TorchOps().rope_and_write(
        qkv, angles.cos(), angles.sin(), positions, places, keys, values, num_heads, None, None, 1e-5, True
    )
    heads = qkv.view(num_tokens, -1, HEAD_DIM).transpose(0, 1)[None]
    wide = angles.repeat(1, 2)[positions][None]
    rotate = apply_rotary_pos_emb if columns == HEAD_DIM else apply_partial_rotary_pos_emb
    expected_q, expected_k = rotate(heads[:, :4], heads[:, 4:6], wide.cos(), wide.sin())
    torch.testing.assert_close(q, expected_q[0].transpose(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(keys[places], expected_k[0].transpose(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(values[places], heads[0, 6:].transpose(0, 1))
    others = torch.ones(NUM_PLACES, dtype=torch.bool)
    others[places] = False
    assert torch.equal(keys[others], untouched[others])


def test_query_and_key_norms_come_before_rotation() -> None:
    qkv, weights = torch.randn(3, 4 * HEAD_DIM), torch.rand(2, HEAD_DIM)
    keys, values = arenas(1)
    angles = torch.rand(4, HEAD_DIM // 2)
    positions = torch.arange(3)
    arguments = (angles.cos(), angles.sin(), positions, positions, keys, values, 2)
    q = TorchOps().rope_and_write(qkv, *arguments, weights[0], weights[1], 1e-5, True)
    normed = qkv.clone().view(3, 4, HEAD_DIM)
    for heads, weight in ((slice(0, 2), weights[0]), (slice(2, 3), weights[1])):
        normed[:, heads] = functional.rms_norm(normed[:, heads], (HEAD_DIM,), weight, 1e-5)
    written = keys[:3].clone()
    expected = TorchOps().rope_and_write(normed.view(3, -1), *arguments, None, None, 1e-5, True)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(written, keys[:3])


def test_without_rotation_queries_and_keys_stay_as_they_are() -> None:
    qkv = torch.randn(3, 4 * HEAD_DIM)
    keys, values = arenas(1)
    positions = torch.arange(3)
    table = torch.rand(4, HEAD_DIM // 2)
    q = TorchOps().rope_and_write(qkv, table, table, positions, positions, keys, values, 2, None, None, 1e-5, False)
    assert torch.equal(q, qkv.view(3, 4, HEAD_DIM)[:, :2])
    assert torch.equal(keys[:3], qkv.view(3, 4, HEAD_DIM)[:, 2:3])


def test_gates_multiply_what_goes_up() -> None:
    gate, up = torch.randn(2, 3, 10)
    both = torch.cat((gate, up), 1)
    torch.testing.assert_close(TorchOps().silu_mul(both, "silu"), functional.silu(gate) * up)
    torch.testing.assert_close(TorchOps().silu_mul(both, "gelu_tanh"), functional.gelu(gate, approximate="tanh") * up)


def test_copies_read_everything_before_they_write() -> None:
    keys, values = (torch.stack(arenas(2)) for _ in range(2))
    expected = keys.clone()
    sources, targets = torch.arange(0, 20), torch.arange(5, 25)
    expected[:, targets] = keys[:, sources].clone()
    TorchOps().copy(keys, values, sources, targets)
    assert torch.equal(keys, expected)
    assert torch.equal(values, expected)
