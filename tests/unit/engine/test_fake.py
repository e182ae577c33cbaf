import time
from collections.abc import Iterable
from dataclasses import replace

import pytest

from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.fake import CRASH_STATUS, FakeBehaviour, FakeEngine, FakeEngineFault
from batchinfer.records import Prompt, SamplingParams

GREEDY = SamplingParams(max_new_tokens=40)
DRAWN = replace(GREEDY, temperature=1.0)


def make(
    params: SamplingParams = GREEDY, num: int = 50, *, prompt: tuple[int, ...] | None = None, row: str = "s"
) -> list[Sequence]:
    return [
        Sequence(Prompt(f"{row}:{index}", prompt or (index, index + 1, 7), params), sample)
        for index in range(num)
        for sample in range(params.n)
    ]


def drain(engine: FakeEngine, submitted: Iterable[Sequence]) -> list[Generation]:
    engine.submit(submitted)
    ends: list[Generation] = []
    while engine.num_unfinished:
        ends += engine.step()
    return ends


def by_id(ends: Iterable[Generation]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {end.sequence.sequence_id: end.token_ids for end in ends}


def test_completions_do_not_depend_on_order_capacity_or_engine() -> None:
    for params in (GREEDY, replace(DRAWN, n=3)):
        submitted = make(params)
        expected = by_id(drain(FakeEngine(), submitted))
        assert by_id(drain(FakeEngine(capacity=3), submitted[::-1])) == expected
        assert len(expected) == len(submitted)


def test_greedy_depends_on_the_prompt_alone() -> None:
    one = drain(FakeEngine(), make(replace(GREEDY, seed=1, n=2), num=2, prompt=(5, 6)))
    assert len({end.token_ids for end in one}) == 1
    assert drain(FakeEngine(), make(num=1, prompt=(5, 6, 7)))[0].token_ids != one[0].token_ids


def test_sampled_tokens_depend_on_seed_row_and_sample() -> None:
    ends = drain(FakeEngine(), make(replace(DRAWN, n=2, ignore_eos=True), num=2, prompt=(5, 6)))
    ends += drain(FakeEngine(), make(replace(DRAWN, n=2, ignore_eos=True, seed=1), num=2, prompt=(5, 6)))
    assert len({end.token_ids for end in ends}) == 8


def test_lengths_are_skewed_and_between_one_and_the_limit() -> None:
    ends = drain(FakeEngine(), make(num=2000))
    lengths = sorted(len(end.token_ids) for end in ends)
    assert lengths[0] == 1
    assert lengths[-1] == 40
    assert lengths[1000] < 12
    assert all((end.finish_reason == "length") == (len(end.token_ids) == 40) for end in ends)


def test_length_bounds_and_ignore_eos_are_kept() -> None:
    assert {len(end.token_ids) for end in drain(FakeEngine(), make(replace(GREEDY, ignore_eos=True)))} == {40}
    assert min(len(end.token_ids) for end in drain(FakeEngine(), make(replace(GREEDY, min_new_tokens=9)))) == 9
    long = drain(FakeEngine(), make(replace(GREEDY, max_new_tokens=200_000, ignore_eos=True), num=1))
    assert len(long[0].token_ids) == 200_000


def test_ids_stay_between_the_reserved_ones_and_the_vocabulary() -> None:
    tokens = {t for end in drain(FakeEngine(vocab_size=20, reserved=5), make(num=500)) for t in end.token_ids}
    assert tokens == set(range(5, 20))
    with pytest.raises(ValueError, match="leaves no token id"):
        FakeEngine(vocab_size=5, reserved=5)


def test_logprobs_are_well_formed() -> None:
    for end in drain(FakeEngine(), make(replace(DRAWN, logprobs=3))):
        assert end.logprobs is not None
        assert tuple(scored.token_id for scored in end.logprobs) == end.token_ids
        for scored in end.logprobs:
            values = [value for _, value in scored.top]
            assert scored.logprob <= 0
            assert values == sorted(values, reverse=True)
            assert len({token for token, _ in scored.top}) == 3
            assert scored.top[0] == (scored.token_id, scored.logprob)


def test_speed_is_kept_by_sleeping_in_short_steps() -> None:
    slept: list[float] = []
    engine = FakeEngine(FakeBehaviour(tokens_per_s=1000.0, start_s=2.5), sleep=slept.append)
    ends = drain(engine, make(num=200))
    assert slept[0] == 2.5
    num_tokens = sum(len(end.token_ids) for end in ends)
    assert sum(slept[1:]) == pytest.approx(num_tokens / 1000.0)
    assert max(slept[1:]) <= 0.05 + 40 / 1000.0


def test_a_poisoned_prompt_kills_the_process_each_time_it_is_generated() -> None:
    class Died(BaseException):
        pass

    def die(status: int) -> None:
        assert status == CRASH_STATUS
        raise Died

    engine = FakeEngine(FakeBehaviour(poison_token_id=99), crash=die)
    engine.submit([*make(num=3), *make(num=1, prompt=(1, 99), row="poison")])
    for _ in range(2):
        with pytest.raises(Died):
            engine.step()
    clean = FakeEngine(FakeBehaviour(poison_token_id=99), crash=die)
    assert len(drain(clean, make(num=3))) == 3


def test_faults_come_at_the_rate_and_moments_the_seed_says() -> None:
    def failing_steps(seed: int) -> list[int]:
        engine = FakeEngine(FakeBehaviour(error_rate=0.2, fault_seed=seed), capacity=1)
        engine.submit(make(num=2000))
        failed = []
        for step in range(1000):
            try:
                engine.step()
            except FakeEngineFault:
                failed.append(step)
        return failed

    assert failing_steps(3) == failing_steps(3)
    assert failing_steps(3) != failing_steps(4)
    assert 130 < len(failing_steps(3)) < 270


def test_crashes_come_at_their_rate() -> None:
    crashes: list[int] = []
    engine = FakeEngine(FakeBehaviour(crash_rate=0.1), capacity=1, crash=crashes.append)
    drain(engine, make(num=1000))
    assert 60 < len(crashes) < 140


def test_abort_stats_and_close() -> None:
    engine = FakeEngine()
    engine.submit(make(num=10))
    engine.abort([("s:3", 0), ("unknown", 0)])
    assert (engine.num_unfinished, engine.stats().num_waiting) == (9, 9)
    ends = engine.step()
    stats = engine.stats()
    assert (stats.num_finished, stats.num_prompt_tokens, stats.num_waiting) == (9, 27, 0)
    assert stats.num_completion_tokens == sum(len(end.token_ids) for end in ends)
    assert engine.step() == []
    engine.submit(make(num=2))
    engine.close()
    assert engine.num_unfinished == 0


def test_short_rows_cost_next_to_nothing() -> None:
    """The goal is 50,000 rows/s on an idle core; a tenth of it must hold on any machine however busy."""
    submitted = make(replace(GREEDY, max_new_tokens=16), num=10_000)
    start_s = time.process_time()
    drain(FakeEngine(), submitted)
    assert len(submitted) / (time.process_time() - start_s) > 5_000
