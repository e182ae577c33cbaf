"""From a prompt to one sequence per choice, and from their log-probabilities to one completion."""

import math
from dataclasses import replace

import pytest

from batchinfer.cluster.choices import NO_CHOICE, choice_scores, choose, sequences_of_choices
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.records import Completion, Prompt, RowError, SamplingParams, TokenLogprobs

CHOICES = ("yes", "no", "no idea")
TOKENS = ((5,), (6,), (6, 7, 8))
PROMPT = Prompt("shard:3", [1, 2, 3], SamplingParams(choices=CHOICES, temperature=0.7, seed=9), TOKENS)


def end_of(sequence: Sequence, *logprobs: float) -> Generation:
    scores = tuple(TokenLogprobs(token, value) for token, value in zip(sequence.forced, logprobs, strict=True))
    return Generation(sequence, sequence.forced, "stop", scores)


def test_each_choice_is_a_sequence_of_its_own_behind_one_prompt() -> None:
    sequences = sequences_of_choices(PROMPT)
    assert [(it.sample, it.forced, it.sequence_id) for it in sequences] == [
        (index, tokens, ("shard:3", index)) for index, tokens in enumerate(TOKENS)
    ]
    assert len({id(it.prompt) for it in sequences}) == 1
    prompt = sequences[0].prompt
    assert (prompt.row_id, prompt.token_ids) == ("shard:3", [1, 2, 3])
    # Nothing is drawn, room is made for the longest, and the engine is asked for what the scores are made of.
    assert prompt.sampling == SamplingParams(max_new_tokens=3, logprobs=0, choices=CHOICES)


def test_rivals_are_asked_for_where_the_job_asks_for_them() -> None:
    asking = replace(PROMPT, sampling=replace(PROMPT.sampling, logprobs=4))
    assert sequences_of_choices(asking)[0].prompt.sampling.logprobs == 4


def test_the_likeliest_choice_is_the_completion_and_all_are_scored_in_order() -> None:
    yes, no, no_idea = sequences_of_choices(PROMPT)
    ends = [end_of(no_idea, -0.5, -0.25, -0.125), end_of(yes, -2.0), end_of(no, -0.5)]
    (row,) = choose(ends)
    assert isinstance(row, Completion)
    assert (row.row_id, row.sample, row.text, row.token_ids, row.finish_reason) == ("shard:3", 0, "no", (6,), "stop")
    assert row.num_prompt_tokens == 3
    assert row.logprobs == (TokenLogprobs(6, -0.5),)
    assert row.choices is not None
    assert [(it.choice, it.logprob, it.num_tokens) for it in row.choices] == [
        ("yes", -2.0, 1),
        ("no", -0.5, 1),
        ("no idea", -0.875, 3),
    ]
    total = math.exp(-2.0) + math.exp(-0.5) + math.exp(-0.875)
    expected = [math.exp(score) / total for score in (-2.0, -0.5, -0.875)]
    assert [it.probability for it in row.choices] == pytest.approx(expected)


def test_rows_are_told_apart_whatever_the_order_of_their_ends() -> None:
    rows = [replace(PROMPT, row_id=f"shard:{number}") for number in range(3)]
    ends = [
        end_of(sequence, *[-1.0 - abs(sequence.sample - number)] * len(sequence.forced))
        for number, prompt in enumerate(rows)
        for sequence in sequences_of_choices(prompt)
    ]
    found = {it.row_id: it for it in choose(reversed(ends))}
    # The third row's likeliest token makes the longest choice, which three of them make less likely again.
    assert {key: it.text for key, it in found.items() if isinstance(it, Completion)} == {
        "shard:0": "yes",
        "shard:1": "no",
        "shard:2": "no",
    }


def test_the_first_of_equal_choices_is_taken() -> None:
    yes, no, no_idea = sequences_of_choices(PROMPT)
    (row,) = choose([end_of(no, -1.0), end_of(yes, -1.0), end_of(no_idea, -1.0, -0.0, -0.0)])
    assert isinstance(row, Completion)
    assert row.text == "yes"


def test_impossible_choices_have_no_share_and_a_row_of_them_alone_is_a_dead_letter() -> None:
    yes, no, no_idea = sequences_of_choices(PROMPT)
    impossible = [end_of(no, -math.inf), end_of(no_idea, -math.inf, -1.0, -math.inf)]
    (row,) = choose([end_of(yes, -1.0), *impossible])
    assert isinstance(row, Completion)
    assert [it.probability for it in row.choices or ()] == [1.0, 0.0, 0.0]
    (dead,) = choose([end_of(yes, -math.inf), *impossible])
    assert isinstance(dead, RowError)
    assert (dead.row_id, dead.error_type) == ("shard:3", NO_CHOICE)


def test_shares_of_very_unlikely_texts_are_exact() -> None:
    scores = choice_scores(["a", "b"], [-4000.0, -4000.0 - math.log(3)], [900, 900])
    assert [it.probability for it in scores] == pytest.approx([0.75, 0.25])
