"""Thousands of random sequences through few continuous engines: right to the token, and nothing is left behind."""

import gc
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.step_tensors import StepTensors
from batchinfer.records import Prompt, SamplingParams
from tests.unit.engine.tiny_models import EOS, VOCAB, drain, tiny_decoder, tiny_model

NUM_DIFFERENT = 200
#: Sequences submitted and not ended.
NUM_IN_HAND = 40

SequenceId = tuple[str, int]


def text_of(token_ids: tuple[int, ...]) -> str:
    return "".join(chr(97 + token % 26) + chr(97 + token // 26) for token in token_ids)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny_decoder(tiny_model("llama"), tmp_path_factory.mktemp("llama"), max_positions=128)


@dataclass
class Flaky:
    """A decoder on a device that is short of memory now and then; ``device`` and ``config`` are its decoder's."""

    decoder: Decoder
    dice: random.Random
    num_failures: int = 0

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def forward(self, step: StepTensors, kv: kv_cache.KvCache) -> torch.Tensor:
        # Small steps fit: what fails is then never the fault of a row.
        if len(step.tokens_T) > 4 and self.dice.random() < 0.02:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.decoder.forward(step, kv)


def random_sequences(dice: random.Random) -> list[Sequence]:
    """Prompts alone, behind templates and in families of samples; every parameter, mostly few tokens."""
    templates = [tuple(dice.randrange(3, VOCAB) for _ in range(length)) for length in (6, 11, 17)]
    found: list[Sequence] = []
    while len(found) < NUM_DIFFERENT:
        own = tuple(dice.randrange(3, VOCAB) for _ in range(1 + int(14 * dice.random() ** 2)))
        prompt = dice.choice(templates) + own if dice.random() < 0.5 else own
        max_new_tokens = dice.choice((1, 2, 4, 8, 20))
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=dice.choice((0, 0, 1, max_new_tokens // 2)),
            temperature=dice.choice((0.0, 0.7, 1.3)),
            top_p=dice.choice((1.0, 0.9)),
            top_k=dice.choice((0, 0, 5, 200)),
            min_p=dice.choice((0.0, 0.0, 0.05)),
            repetition_penalty=dice.choice((1.0, 1.0, 1.3)),
            n=dice.choice((1, 1, 1, 3)),
            seed=dice.randrange(3),
            stop=dice.choice(((), (), ("a", "bc"))),
            stop_token_ids=dice.choice(((), (7, 8, 9))),
            ignore_eos=dice.random() < 0.5,
            logprobs=dice.choice((None, None, 0, 2)),
        )
        row = Prompt(f"soak:{len(found)}", prompt, params)
        found += (Sequence(row, sample) for sample in range(params.n))
    return found


def random_limits(dice: random.Random) -> Limits:
    max_rows = dice.randint(2, 24)
    return Limits(
        num_places=dice.randint(60, 600),
        max_rows=max_rows,
        max_step_tokens=max_rows + dice.randint(0, 60),
        granule=dice.choice((1, 4, 16)),
        growth_tokens=dice.choice((1, 4, 16)),
        min_prefix_tokens=dice.choice((2, 8)),
        min_prefix_rows=dice.randint(2, 4),
        prefix_block=dice.choice((2, 4)),
        max_waiting_scan=dice.choice((1, 8, 32)),
        prior_output_tokens=dice.choice((1, 10)),
        reserve=dice.choice((0.0, 0.1)),
    )


def engine_over(device: Decoder | Flaky, limits: Limits, num_steps_ahead: int = 0) -> ContinuousEngine:
    kv = kv_cache.allocate(device.config, limits.num_places, torch.float32, torch.device("cpu"))
    return ContinuousEngine(
        device,  # type: ignore[arg-type]
        kv,
        limits,
        eos_token_ids=[EOS],
        max_model_len=100,
        decode=text_of,
        num_steps_ahead=num_steps_ahead,
    )


def assert_empty(engine: ContinuousEngine) -> None:
    """Nothing of any sequence is left, neither in the engine nor in what it is made of."""
    assert engine.step() == []
    scheduler = engine._scheduler
    assert scheduler.plan() is None
    scheduler.check()
    counters = engine.counters
    assert (counters.num_running, counters.num_waiting, counters.num_places_used) == (0, 0, 0)
    room = scheduler._room
    forecast, prefixes, index = room._forecast, room.prefixes, room.prefixes._index
    kept = (
        *(engine._rows, engine._number_of, engine._flights, engine._ended, engine._failed_alone_at),
        *(scheduler._rows, scheduler._prefill, scheduler._decode, scheduler._complete, scheduler._ending),
        *(forecast._rows, forecast._spans, forecast._ending),
        *(room.kept, prefixes, index, index._root._children, index._families._children),
    )
    assert [len(held) for held in kept] == [0] * len(kept)


@dataclass
class Totals:
    num_ended: int = 0
    num_aborted: int = 0
    num_resumed: int = 0
    num_failures: int = 0
    num_preemptions: int = 0
    num_prefix_hits: int = 0
    num_growths: int = 0
    num_chunked_prefills: int = 0


def run_one_life(
    dice: random.Random,
    decoder: Decoder,
    pool: dict[SequenceId, Sequence],
    expected: dict[SequenceId, Generation],
    partials: dict[SequenceId, Sequence],
    num_sequences: int,
    totals: Totals,
) -> dict[SequenceId, Sequence]:
    """One engine: it goes on with ``partials``, takes ``num_sequences`` more, and is left in the middle of the last.

    Returns what those had come to.
    """
    device = Flaky(decoder, random.Random(dice.random()))
    engine = engine_over(device, random_limits(dice), dice.randrange(2))
    in_hand = dict(partials)
    engine.submit(in_hand.values())
    totals.num_resumed += len(in_hand)
    while num_sequences > 0:
        free = [key for key in dice.sample(list(pool), NUM_IN_HAND // 2) if key not in in_hand]
        new = {key: pool[key] for key in free[: NUM_IN_HAND - len(in_hand)]}
        num_sequences -= len(new)
        in_hand |= new
        engine.submit(new.values())
        for _ in range(dice.randint(1, 8)):
            for end in engine.step():
                key = end.sequence.sequence_id
                del in_hand[key]
                totals.num_ended += 1
                whole = expected[key]
                assert (end.token_ids, end.finish_reason, end.error) == (whole.token_ids, whole.finish_reason, None)
                assert len(end.logprobs or ()) == len(whole.logprobs or ())
        unwanted = [key for key in in_hand if dice.random() < 0.01]
        engine.abort(unwanted)
        totals.num_aborted += len(unwanted)
        for key in unwanted:
            del in_hand[key]
        if dice.random() < 0.02:
            engine._scheduler.check()
    left = {
        partial.sequence.sequence_id: replace(
            pool[partial.sequence.sequence_id], token_ids=partial.token_ids, logprobs=partial.logprobs
        )
        for partial in engine.in_progress()
    }
    assert left.keys() <= in_hand.keys()
    engine.abort(in_hand)
    assert_empty(engine)
    counters = engine.counters
    totals.num_failures += device.num_failures
    totals.num_preemptions += counters.num_preemptions
    totals.num_prefix_hits += counters.num_prefix_hits
    totals.num_growths += counters.num_growths
    totals.num_chunked_prefills += counters.num_chunked_prefills
    return left


def soak(decoder: Decoder, num_lives: int, num_sequences: int, seed: int) -> Totals:
    """``num_lives`` engines of ``num_sequences`` each; objects and memory of the process must not grow from the third
    life on."""
    dice = random.Random(seed)
    pool = {sequence.sequence_id: sequence for sequence in random_sequences(dice)}
    roomy = Limits(num_places=8192, max_rows=16, max_step_tokens=256)
    expected = drain(engine_over(decoder, roomy), pool.values())
    totals = Totals()
    partials: dict[SequenceId, Sequence] = {}
    sizes: list[tuple[int, int]] = []
    for _ in range(num_lives):
        partials = run_one_life(dice, decoder, pool, expected, partials, num_sequences, totals)
        gc.collect()
        resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        sizes.append((len(gc.get_objects()), resident_bytes))
    (first_objects, first_bytes), (last_objects, last_bytes) = sizes[2], sizes[-1]
    assert last_objects - first_objects < 2_000
    assert last_bytes - first_bytes < 32 << 20
    return totals


def every_rule_was_put_to_work(totals: Totals, times: int) -> bool:
    return (
        min(
            totals.num_aborted,
            totals.num_resumed,
            totals.num_failures,
            totals.num_preemptions,
            totals.num_prefix_hits,
            totals.num_growths,
            totals.num_chunked_prefills,
        )
        >= times
    )


def test_a_thousand_random_sequences_are_right_and_leave_nothing_behind(decoder: Decoder) -> None:
    totals = soak(decoder, num_lives=5, num_sequences=200, seed=1)
    assert totals.num_ended > 700
    assert every_rule_was_put_to_work(totals, 5), totals


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_thousand_random_sequences_are_right_and_leave_nothing_behind(decoder: Decoder) -> None:
    totals = soak(decoder, num_lives=40, num_sequences=500, seed=2)
    assert totals.num_ended > 15_000
    assert every_rule_was_put_to_work(totals, 30), totals
