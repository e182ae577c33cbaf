"""The continuous engine when memory ends: smaller steps, every row goes on with what it has, results stay."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from batchinfer.engine import kv_cache, sampler
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.engine.engine import Generation
from batchinfer.engine.out_of_memory import is_out_of_memory
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.step_tensors import StepTensors
from batchinfer.records import SamplingParams
from tests.unit.engine.tiny_models import EOS, drain, ragged_prompts, sequences, tiny_decoder, tiny_model

GREEDY = SamplingParams(max_new_tokens=24)
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.9, seed=5, n=2, logprobs=1, repetition_penalty=1.1)
ROOMY = Limits(num_places=2048, max_rows=32, max_step_tokens=256, min_prefix_tokens=8)

#: Number of the forward pass and its tensors -> whether the device's memory is enough for it.
Fits = Callable[[int, StepTensors], bool]


@dataclass
class ShortOfMemory:
    """A decoder on a device that refuses some steps."""

    decoder: Decoder
    fits: Fits
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("CUDA out of memory")
    #: Tokens of each step, and whether it was carried out.
    steps: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def num_failures(self) -> int:
        return sum(not fitted for _, fitted in self.steps)

    def forward(self, step: StepTensors, kv: kv_cache.KvCache) -> torch.Tensor:
        fitted = self.fits(len(self.steps), step)
        self.steps.append((len(step.tokens_T), fitted))
        if not fitted:
            # What a pass that failed half-way may leave in the places it was to write.
            kv.keys_LNKD[:, step.places_T] = 100.0
            raise self.error()
        return self.decoder.forward(step, kv)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def engine_over(device: ShortOfMemory | Decoder, num_steps_ahead: int = 0, limits: Limits = ROOMY) -> ContinuousEngine:
    kv = kv_cache.allocate(device.config, limits.num_places, torch.float32, torch.device("cpu"))
    return ContinuousEngine(
        device,  # type: ignore[arg-type]
        kv,
        limits,
        eos_token_ids=[EOS],
        max_model_len=512,
        num_steps_ahead=num_steps_ahead,
    )


def assert_equal(ends: dict[tuple[str, int], Generation], expected: dict[tuple[str, int], Generation]) -> None:
    assert {key: (end.token_ids, end.finish_reason, end.error) for key, end in ends.items()} == {
        key: (end.token_ids, end.finish_reason, end.error) for key, end in expected.items()
    }
    for key, end in ends.items():
        for scored, other in zip(end.logprobs or (), expected[key].logprobs or (), strict=True):
            assert scored.logprob == pytest.approx(other.logprob, abs=1e-4)


def num_logits(step: StepTensors) -> int:
    return len(step.tokens_T) if step.logits_rows_S is None else len(step.logits_rows_S)


FITS: dict[str, Fits] = {
    "few tokens": lambda number, step: len(step.tokens_T) <= 11,
    "few rows": lambda number, step: num_logits(step) <= 3,
    "one token": lambda number, step: len(step.tokens_T) <= 1,
    "now and then": lambda number, step: number not in (3, 10, 30, 31, 60),
    "once in prefill": lambda number, step: number != 0,
    "for a while": lambda number, step: not 10 <= number < 16,
}


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_results_are_the_same_when_memory_is_short(
    decoder: Decoder, params: SamplingParams, name: str, num_steps_ahead: int
) -> None:
    template = tuple(range(30, 42))
    submitted = sequences([template + prompt for prompt in ragged_prompts(9, seed=1, longest=12)], params)
    expected = drain(engine_over(decoder), submitted)
    device = ShortOfMemory(decoder, FITS[name])
    engine = engine_over(device, num_steps_ahead)
    assert_equal(drain(engine, submitted, max_steps=20_000), expected)
    assert device.num_failures > 0
    stats = engine.stats()
    assert (stats.num_active, stats.num_waiting, stats.num_places_used, stats.num_finished) == (0, 0, 0, len(submitted))
    if name in ("now and then", "for a while", "one token"):
        assert stats.num_preemptions > 0
    assert device.num_failures < 20


def test_what_fails_is_halved_and_not_single_file(decoder: Decoder) -> None:
    device = ShortOfMemory(decoder, lambda number, step: len(step.tokens_T) <= 40)
    drain(engine_over(device), sequences(ragged_prompts(32, seed=2), replace(GREEDY, ignore_eos=True)))
    assert max(tokens for tokens, fitted in device.steps if fitted) > 20
    assert device.num_failures <= 4


def test_limits_come_back_when_memory_does(decoder: Decoder) -> None:
    device = ShortOfMemory(decoder, lambda number, step: number > 3)
    engine = engine_over(device)
    submitted = sequences(ragged_prompts(40, seed=2), replace(GREEDY, max_new_tokens=150, ignore_eos=True))
    engine.submit(submitted)
    lowest = ROOMY.max_step_tokens
    while engine.num_unfinished:
        engine.step()
        lowest = min(lowest, engine.limits.max_step_tokens)
    assert lowest < ROOMY.max_step_tokens / 8
    assert engine.limits == ROOMY


@pytest.mark.parametrize("num_steps_ahead", [0, 1], ids=["in-step", "one-step-ahead"])
def test_a_row_that_does_not_fit_alone_ends_with_an_error_and_the_others_complete(
    decoder: Decoder, num_steps_ahead: int
) -> None:
    prompts = [*ragged_prompts(6, seed=3, longest=10), tuple(range(3, 63))]
    expected = drain(engine_over(decoder), sequences(prompts[:6], GREEDY))

    def fits(number: int, step: StepTensors) -> bool:
        return int(step.positions_T.max()) < 50

    device = ShortOfMemory(decoder, fits)
    ends = drain(engine_over(device, num_steps_ahead), sequences(prompts, GREEDY))
    too_long = ends.pop(("shard:6", 0))
    assert too_long.error is not None
    assert (too_long.error.error_type, too_long.error.row_id) == ("out_of_memory", "shard:6")
    assert_equal(ends, expected)
    assert device.num_failures < 20


@pytest.mark.parametrize("num_before", [0, 20])
def test_where_nothing_fits_any_more_no_row_is_blamed(decoder: Decoder, num_before: int) -> None:
    device = ShortOfMemory(decoder, lambda number, step: number < num_before)
    engine = engine_over(device)
    submitted = sequences(ragged_prompts(9, seed=4), replace(GREEDY, ignore_eos=True))
    engine.submit(submitted)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a step of one token"):
        drain(engine, [], max_steps=60)
    assert len(engine.in_progress()) == (len(submitted) if num_before else 0)


@pytest.mark.parametrize(("place", "period"), [("draw", 7), ("_to_host", 37)])
def test_a_full_sampler_is_a_lack_of_memory_too(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, place: str, period: int
) -> None:
    """The forward pass was carried out and its tokens are lost, at the second place after the sampler counted them."""
    submitted = sequences(ragged_prompts(9, seed=5), DRAWN)
    expected = drain(engine_over(decoder), submitted)
    real, num_calls = getattr(sampler, place), 0

    def short_of_memory(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls % period == 0:
            raise torch.OutOfMemoryError("no room for the vocabulary")
        return real(*arguments)

    monkeypatch.setattr(sampler, place, short_of_memory)
    assert_equal(drain(engine_over(decoder, 1), submitted), expected)
    assert num_calls > period


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: MemoryError("Unable to allocate 711. PiB for an array"),
    ],
)
def test_every_face_of_a_lack_of_memory_is_known(decoder: Decoder, error: Callable[[], Exception]) -> None:
    submitted = sequences(ragged_prompts(3, seed=6), GREEDY)
    expected = drain(engine_over(decoder), submitted)
    device = ShortOfMemory(decoder, lambda number, step: number != 2, error)
    assert_equal(drain(engine_over(device), submitted), expected)


def test_what_torch_and_numpy_raise_on_a_cpu_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value)


def test_an_error_of_the_model_itself_is_not_taken_for_a_lack_of_memory(decoder: Decoder) -> None:
    device = ShortOfMemory(decoder, lambda number, step: False, lambda: RuntimeError("a kernel failed"))
    engine = engine_over(device)
    engine.submit(sequences([(3,)], GREEDY))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.step()
