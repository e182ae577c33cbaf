"""The padded engine on a CUDA device. Needs torch and transformers alone, but for the whole job at the end."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from batchinfer.engine.engine import Generation  # noqa: E402
from batchinfer.engine.engine import Sequence as EngineSequence  # noqa: E402
from batchinfer.engine.padded import PaddedEngine  # noqa: E402
from batchinfer.records import Prompt, SamplingParams  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

VOCAB_SIZE = 512
NUM_ROWS = 24
NUM_NEW_TOKENS = 32


def llama(dtype: "torch.dtype", device: str) -> "transformers.PreTrainedModel":
    """Random weights, the same ones on every device; 32 KiB of float32 KV per token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.08,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval().to(device)


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Matrix products in full float32: TF32 keeps ten bits of the mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def sequences(
    lengths: Iterable[int], num_new_tokens: int = NUM_NEW_TOKENS, logprobs: int | None = None
) -> list[EngineSequence]:
    sampling = SamplingParams(max_new_tokens=num_new_tokens, ignore_eos=True, logprobs=logprobs)
    return [
        EngineSequence(Prompt(f"gpu:{row}", tuple((row * 31 + k * 7) % VOCAB_SIZE for k in range(length)), sampling))
        for row, length in enumerate(lengths)
    ]


def ragged(num_rows: int = NUM_ROWS) -> list[int]:
    return [1 + (row * row * 5) % 97 for row in range(num_rows)]


def engine(model: "transformers.PreTrainedModel", **limits: int) -> PaddedEngine:
    return PaddedEngine(model, eos_token_ids=(), pad_token_id=0, max_model_len=4096, **limits)


def run(driven: PaddedEngine, wanted: Sequence[EngineSequence]) -> dict[str, Generation]:
    driven.submit(wanted)
    found: dict[str, Generation] = {}
    while driven.num_unfinished:
        found |= {end.sequence.prompt.row_id: end for end in driven.step()}
    assert len(found) == len(wanted)
    return found


def test_greedy_bfloat16_runs_every_row_to_its_end() -> None:
    found = run(engine(llama(torch.bfloat16, "cuda"), max_batch_rows=7), sequences(ragged()))
    assert {end.error for end in found.values()} == {None}
    assert {len(end.token_ids) for end in found.values()} == {NUM_NEW_TOKENS}
    assert len({end.token_ids for end in found.values()}) > 1


@pytest.mark.usefixtures("exact_float32")
def test_float32_on_the_device_says_what_the_cpu_says() -> None:
    """Log-probabilities of every generated token agree as long as the texts do; a flip needs a near tie."""
    wanted = sequences(ragged(), logprobs=2)
    on_cpu = run(engine(llama(torch.float32, "cpu")), wanted)
    on_cuda = run(engine(llama(torch.float32, "cuda"), max_batch_rows=5), wanted)
    for row_id, expected in on_cpu.items():
        found = on_cuda[row_id]
        assert expected.logprobs is not None
        assert found.logprobs is not None
        for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            if ours.token_id != theirs.token_id:
                best, second = (logprob for _, logprob in theirs.top)
                assert best - second < 1e-4, f"{row_id} flips without a tie"
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_out_of_memory_halves_the_batch_and_loses_no_row() -> None:
    """The limits are made to promise far more than the fraction of the device that this process may use."""
    model = llama(torch.float32, "cuda")
    wanted = sequences([256] * 64, num_new_tokens=64)
    undisturbed = run(engine(model, max_batch_rows=4), wanted)
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    # KV of all rows at once takes about 640 MiB, of a quarter of them 160 MiB.
    allowed_bytes = torch.cuda.memory_reserved() + (320 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed_bytes / total_bytes)
    try:
        crowded = engine(model, max_batch_rows=64, max_batch_tokens=1 << 20)
        before = crowded.limits
        found = run(crowded, wanted)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert crowded.limits.max_tokens < before.max_tokens
    assert {end.error for end in found.values()} == {None}
    assert {row_id: len(end.token_ids) for row_id, end in found.items()} == dict.fromkeys(undisturbed, 64)


def test_a_job_runs_on_the_device(tmp_path: Path) -> None:
    for package in ("ray", "pydantic", "yaml", "click", "safetensors", "tokenizers"):
        pytest.importorskip(package)
    import batchinfer
    from tests.jobs import job, read_rows, write_input
    from tests.tiny import tiny_exaone3

    tiny_exaone3(tmp_path / "model")
    source = write_input(tmp_path / "in", [40, 23])
    spec = job(tmp_path / "model", source, tmp_path / "out", model={"device": "cuda", "dtype": "bfloat16"})
    result = batchinfer.run(spec)
    assert (result.outcome, result.num_completions) == ("complete", 63)
    assert batchinfer.verify(str(tmp_path / "out")).verdict == "complete"
    assert len(read_rows(tmp_path / "out")) == 63
