import torch

from batchinfer.engine.threads import fewest_worst, settle_num_threads


def test_more_threads_win_when_they_are_faster_every_time() -> None:
    assert fewest_worst({1: [2.0, 2.1, 2.2], 2: [1.1, 1.2, 1.3]}) == 2


def test_one_thread_wins_when_more_of_them_stall_now_and_then() -> None:
    assert fewest_worst({1: [2.0, 2.0, 2.1, 2.2], 2: [1.0, 1.1, 9.0, 30.0]}) == 1


def test_a_single_stall_is_forgiven() -> None:
    assert fewest_worst({1: [2.0, 2.0, 2.1, 2.2], 2: [1.0, 1.1, 1.1, 30.0]}) == 2


def test_the_choice_is_what_torch_uses_from_then_on() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert settle_num_threads() in (1, 2)
        assert torch.get_num_threads() in (1, 2)
    finally:
        torch.set_num_threads(before)
