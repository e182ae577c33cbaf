import random
from itertools import pairwise

from batchinfer.engine.step_limits import StepLimits


def limits_of(limits: StepLimits) -> tuple[int, int]:
    return limits.max_rows, limits.max_step_tokens


def test_half_of_what_failed_is_tried_next_and_rows_go_last() -> None:
    limits = StepLimits(100, 800)
    seen = []
    while limits.max_step_tokens > 1:
        limits.step_failed(limits.max_step_tokens)
        seen.append(limits_of(limits))
    assert seen[:5] == [(100, 400), (100, 200), (100, 100), (50, 50), (25, 25)]
    limits.step_failed(1)
    assert limits_of(limits) == (1, 1)


def test_a_small_step_that_failed_says_more_than_the_limit() -> None:
    limits = StepLimits(100, 800)
    limits.step_failed(7)
    assert limits_of(limits) == (3, 3)


def test_steps_that_fit_bring_the_limits_back() -> None:
    limits = StepLimits(4, 16)
    assert not any(limits.step_fitted() for _ in range(1000)), "nothing to bring back"
    limits.step_failed(16)
    limits.step_failed(8)
    rises = [(step, *limits_of(limits)) for step in range(1, 400) if limits.step_fitted()]
    assert rises == [(64, 4, 8), (128, 4, 16)]


def test_a_device_that_stays_too_small_fails_ever_more_rarely() -> None:
    limits = StepLimits(64, 4096)
    failures = [step for step in range(100_000) if not step_fits(limits, 300)]
    assert len(failures) < 25
    gaps = [after - before for before, after in pairwise(failures[4:])]
    assert gaps == sorted(gaps)


def step_fits(limits: StepLimits, num_tokens_at_most: int) -> bool:
    if limits.max_step_tokens > num_tokens_at_most:
        limits.step_failed(limits.max_step_tokens)
        return False
    limits.step_fitted()
    return True


def test_limits_stay_between_one_and_what_was_given() -> None:
    dice = random.Random(1)
    for _ in range(50):
        most_rows = dice.randint(1, 40)
        most_tokens = most_rows + dice.randint(0, 300)
        limits = StepLimits(most_rows, most_tokens)
        for _ in range(500):
            if dice.random() < 0.05:
                limits.step_failed(dice.randint(1, limits.max_step_tokens))
            else:
                limits.step_fitted()
            assert 1 <= limits.max_rows <= min(most_rows, limits.max_step_tokens)
            assert limits.max_step_tokens <= most_tokens
