"""The lean decoder computes what transformers computes, wherever the KV lies and however the tokens are cut."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from batchinfer.engine.decoder_config import decoder_config
from batchinfer.engine.rotary import rotary_tables
from batchinfer.engine.step_plan import Copy, DecodeRow, PrefillChunk
from tests.tiny import tiny_exaone3, tiny_exaone4, tiny_gemma2, tiny_llama
from tests.unit.engine.decoder_worlds import CPU, SUPPORTED, World, make_world

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in SUPPORTED.items()}


@pytest.mark.parametrize("family", SUPPORTED)
def test_whole_prompts_then_decode_from_scattered_extents(directories: dict[str, Path], family: str) -> None:
    world = make_world(directories[family], [41, 5, 17, 1 + 6])
    offsets = [304, 7, 100, 33]
    starts = [len(tokens) - 6 for tokens in world.tokens]
    chunks = [PrefillChunk(i, 0, start, offsets[i], samples=True) for i, start in enumerate(starts)]
    world.assert_close(world.run(prefill=[c for c in chunks if c.num_tokens > 0]), *_ends(starts))
    for step in range(6):
        rows = [DecodeRow(i, start + step, offsets[i]) for i, start in enumerate(starts) if start + step >= 0]
        world.assert_close(world.run(decode=rows), *[(row.sequence, row.position) for row in rows])


@pytest.mark.parametrize("family", SUPPORTED)
def test_prompts_in_chunks_beside_rows_that_decode(directories: dict[str, Path], family: str) -> None:
    world = make_world(directories[family], [30, 40])
    world.assert_close(world.run(prefill=[PrefillChunk(0, 0, 20, 64, samples=True)]), (0, 19))
    for step, (start, stop) in enumerate([(0, 3), (3, 21), (21, 22), (22, 36)]):
        logits = world.run(
            decode=[DecodeRow(0, 20 + step, 64)],
            prefill=[PrefillChunk(1, start, stop, 128, samples=stop == 36)],
        )
        world.assert_close(logits, (0, 20 + step), *([(1, 35)] if stop == 36 else []))
    rows = [DecodeRow(1, 36, 128), DecodeRow(0, 24, 64)]
    world.assert_close(world.run(decode=rows), (1, 36), (0, 24))


@pytest.mark.parametrize("family", SUPPORTED)
def test_sequences_share_one_copy_of_their_prefix(directories: dict[str, Path], family: str) -> None:
    """Holders 0 and 1 are the prefixes; 2 to 4 begin with the first, 5 with the second, 6 with none."""
    world = make_world(directories[family], [20, 11, 34, 25, 23, 24, 15])
    users = {2: 0, 3: 0, 4: 0, 5: 1}
    for user, prefix in users.items():
        world.tokens[user][: len(world.tokens[prefix])] = world.tokens[prefix]
    shared = {0: (240, 20), 1: (96, 11)}
    prefixes = [PrefillChunk(holder, 0, length, place, samples=False) for holder, (place, length) in shared.items()]
    assert world.run(prefill=prefixes).shape[0] == 0
    offsets = {2: 0, 3: 48, 4: 112, 5: 131, 6: 300}
    where = {user: shared[users[user]] if user in users else (0, 0) for user in offsets}
    own = []
    for user, (place, length) in where.items():
        stop = len(world.tokens[user]) - 2
        own.append(PrefillChunk(user, length, stop, offsets[user], True, place, length))
    world.assert_close(world.run(prefill=own), *[(chunk.holder, chunk.stop - 1) for chunk in own])
    for step in range(2):
        rows = [DecodeRow(c.holder, c.stop + step, c.offset, c.prefix_offset, c.prefix_length) for c in own]
        world.assert_close(world.run(decode=rows), *[(row.sequence, row.position) for row in rows])


@pytest.mark.parametrize("family", ["exaone3", "exaone4", "gemma2"])
def test_extents_move_and_are_overwritten_behind_them(directories: dict[str, Path], family: str) -> None:
    """0 moves by less than its length, 1 to where 0 was, 2 to where 1 was; all in the step that decodes them."""
    world = make_world(directories[family], [20, 18, 9])
    places = [32, 96, 160]
    world.run(prefill=[PrefillChunk(i, 0, len(t) - 1, places[i], False) for i, t in enumerate(world.tokens)])
    copies = [Copy(32, 43, 19), Copy(96, 16, 17), Copy(160, 96, 8)]
    # The places of 1 and of the beginning of 0 do not overlap: 16 + 18 reaches into 32 .. 42, which 0 has left.
    rows = [DecodeRow(0, 19, 43), DecodeRow(1, 17, 16), DecodeRow(2, 8, 96)]
    world.assert_close(world.run(decode=rows, copies=copies), (0, 19), (1, 17), (2, 8))


@pytest.mark.parametrize("family", SUPPORTED)
def test_greedy_tokens_are_those_of_generate(directories: dict[str, Path], family: str) -> None:
    world = make_world(directories[family], [3, 21, 9, 14])
    prompts = [list(tokens) for tokens in world.tokens]
    offsets = [0, 48, 112, 160]
    chunks = [PrefillChunk(i, 0, len(prompt), offsets[i], True) for i, prompt in enumerate(prompts)]
    logits = world.run(prefill=chunks)
    for _ in range(16):
        for tokens, row in zip(world.tokens, logits, strict=True):
            tokens.append(int(row.argmax()))
        logits = world.run(decode=[DecodeRow(i, len(t) - 1, offsets[i]) for i, t in enumerate(world.tokens)])
    for prompt, tokens in zip(prompts, world.tokens, strict=True):
        generated = world.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=[],
        )
        assert tokens == generated[0].tolist()


@pytest.mark.parametrize("write", [tiny_exaone3, tiny_exaone4, tiny_gemma2], ids=lambda write: write.__name__)
def test_bfloat16_stays_near_float32(write: object, tmp_path: Path) -> None:
    world = make_world(write(tmp_path), [30, 12], dtype=torch.bfloat16)  # type: ignore[operator]
    logits = world.run(prefill=[PrefillChunk(0, 0, 29, 0, True), PrefillChunk(1, 0, 11, 64, True)])
    assert logits.dtype == torch.bfloat16
    decoded = world.run(decode=[DecodeRow(0, 29, 0), DecodeRow(1, 11, 64)])
    ends = [(0, 28), (1, 10), (0, 29), (1, 11)]
    expected = torch.stack([world.expected(*end) for end in ends])
    distance = (torch.cat((logits, decoded)).float() - expected).abs()
    assert float(distance.mean()) < 0.05 * float(expected.std())


def test_logits_come_for_sampling_tokens_only(directories: dict[str, Path]) -> None:
    world = make_world(directories["llama"], [12, 12, 12])
    logits = world.run(
        decode=[],
        prefill=[PrefillChunk(0, 0, 8, 0, True), PrefillChunk(1, 0, 8, 16, False), PrefillChunk(2, 0, 12, 32, True)],
    )
    world.assert_close(logits, (0, 7), (2, 11))


def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Rows alone and in one batch of very different lengths; only the order of additions may differ."""
    world = make_world(tiny_llama(tmp_path), [200, 3, 60, 61])
    offsets = [0, 208, 224, 304]
    starts = [len(tokens) - 1 for tokens in world.tokens]
    world.run(prefill=[PrefillChunk(i, 0, start, offsets[i], False) for i, start in enumerate(starts)])
    rows = [DecodeRow(i, start, offsets[i]) for i, start in enumerate(starts)]
    together = world.run(decode=rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(world.run(decode=[row])[0], together[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["default", "llama3"],
)
def test_rotary_tables_are_those_of_transformers(rope: dict[str, object]) -> None:
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=32768, rope_parameters=rope)
    cos_PD2, sin_PD2 = rotary_tables(decoder_config(config).rotary, 32768, CPU)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(32768)[None])
    assert torch.equal(cos_PD2, cos[0, :, :64])
    assert torch.equal(sin_PD2, sin[0, :, :64])


def _ends(starts: list[int]) -> list[tuple[int, int]]:
    return [(index, start - 1) for index, start in enumerate(starts) if start > 0]


def test_worlds_reference_sees_what_it_should(directories: dict[str, Path]) -> None:
    """The proof's own footing: windows do cut something here, so that a decoder without them would fail."""
    world: World = make_world(directories["mistral"], [40])
    with torch.no_grad():
        whole = world.reference(torch.tensor([world.tokens[0]])).logits[0, -1]
        changed = [world.tokens[0][0] ^ 1, *world.tokens[0][1:]]
        # Two layers with windows of 8 tokens see 15 tokens back at most.
        same = world.reference(torch.tensor([changed])).logits[0, -1]
    assert torch.equal(whole, same)
