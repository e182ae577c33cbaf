from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.prefixes import PrefixIndex, Stem


def index_of(prompts: list[list[int]], *, block: int = 4, min_tokens: int = 4, min_rows: int = 2) -> PrefixIndex:
    index = PrefixIndex(block, min_tokens, min_rows)
    for sequence, prompt in enumerate(prompts):
        index.add(sequence, prompt, sequence)
    index.check()
    return index


def best(index: PrefixIndex, sequence: int) -> Stem:
    stem = index.best(sequence)
    assert stem is not None
    return stem


def test_a_template_is_shared_up_to_its_last_whole_block() -> None:
    template = list(range(10))
    index = index_of([[*template, 100 + row] for row in range(5)])
    assert best(index, 0).length == 8
    assert best(index, 0).num_waiting == 5
    assert best(index, 0) is best(index, 4)


def test_unrelated_prompts_share_nothing_and_cost_one_stem_each() -> None:
    index = index_of([[row] * 1000 for row in range(50)])
    assert all(index.best(sequence) is None for sequence in range(50))
    assert len(index._root._children) == 50
    assert not any(stem._children for stem in index._root._children.values())


def test_too_few_rows_or_too_short_a_stem_is_not_worth_a_prefix() -> None:
    prompts = [[1, 2, 3, 4, 5, row] for row in range(3)]
    assert index_of(prompts, min_rows=4).best(0) is None
    assert index_of(prompts, min_tokens=5).best(0) is None
    assert index_of(prompts, min_rows=3).best(0) is not None


def test_the_samples_of_one_prompt_share_all_but_its_last_token() -> None:
    index = PrefixIndex(block_tokens=4, min_tokens=4, min_rows=4)
    for sequence in range(2):
        index.add(sequence, [7] * 11, "row")
    assert best(index, 0).length == 10
    assert best(index, 0) is best(index, 1)


def test_the_last_prompt_token_is_never_shared() -> None:
    index = index_of([[1] * 8] * 3)
    assert best(index, 0).length == 4


def test_the_stem_that_saves_most_is_chosen() -> None:
    """Pairs share 12 tokens and save 6 each; all ten share 8 and save 7.2."""
    index = index_of([[*range(8), *[50 + row // 2] * 4, 900 + row, 1] for row in range(10)])
    assert best(index, 0).length == 8
    for sequence in range(4, 10):
        index.remove(sequence)
    index.remove(2)
    index.remove(3)
    assert best(index, 0).length == 12


def test_a_stem_that_is_held_costs_nothing_more() -> None:
    index = index_of([[*range(8), *[50 + row // 2] * 4, 900 + row, 1] for row in range(4)])
    index.remove(2)
    index.remove(3)
    stem = best(index, 0)
    assert stem.length == 12
    index.hold(stem, holder=77)
    index.remove(1)
    assert best(index, 0).holder == 77


def test_a_held_stem_outlives_its_rows_and_is_found_again() -> None:
    index = index_of([[*range(9), row] for row in range(2)])
    stem = best(index, 0)
    index.hold(stem, holder=5)
    index.remove(0)
    index.remove(1)
    index.check()
    index.add(9, [*range(9), 50], 9)
    assert best(index, 9) is stem
    index.remove(9)
    index.vacate(stem)
    index.check()
    assert not index._root._children


def test_removing_an_unknown_row_is_refused() -> None:
    with pytest.raises(KeyError):
        index_of([]).remove(0)


def saved_by_brute_force(
    prompts: dict[int, tuple[int, ...]], families: dict[int, int], mine: int, block: int, least: tuple[int, int]
) -> float:
    min_tokens, min_rows = least
    choices = [0.0]
    num_family = sum(family == families[mine] for family in families.values())
    if len(prompts[mine]) - 1 >= min_tokens and num_family >= 2:
        choices.append((len(prompts[mine]) - 1) * (num_family - 1) / num_family)
    for length in range(block, len(prompts[mine]), block):
        stem = prompts[mine][:length]
        num_rows = sum(len(prompt) > length and prompt[:length] == stem for prompt in prompts.values())
        if length >= min_tokens and num_rows >= min_rows:
            choices.append(length * (num_rows - 1) / num_rows)
    return max(choices)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 9), st.integers(2, 4))
def test_the_best_stem_is_the_one_found_by_comparing_all_rows(
    seed: int, block: int, min_tokens: int, min_rows: int
) -> None:
    dice = Random(seed)
    index = PrefixIndex(block, min_tokens, min_rows)
    prompts: dict[int, tuple[int, ...]] = {}
    families: dict[int, int] = {}
    for sequence in range(30):
        if prompts and dice.random() < 0.3:
            gone = dice.choice(list(prompts))
            index.remove(gone)
            del prompts[gone], families[gone]
        if prompts and dice.random() < 0.2:
            twin = dice.choice(list(prompts))
            prompts[sequence], families[sequence] = prompts[twin], families[twin]
        else:
            prompts[sequence] = tuple(dice.choice((0, 0, 0, 1)) for _ in range(dice.randint(1, 12)))
            families[sequence] = sequence
        index.add(sequence, prompts[sequence], families[sequence])
        index.check()
    assert len(index) == len(prompts)
    for sequence in prompts:
        stem = index.best(sequence)
        saved = 0.0 if stem is None else stem.length * (stem.num_waiting - 1) / stem.num_waiting
        assert saved == pytest.approx(saved_by_brute_force(prompts, families, sequence, block, (min_tokens, min_rows)))
