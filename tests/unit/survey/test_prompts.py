"""What a survey says of the rows it has seen, and of those it has not."""

from dataclasses import replace

import pytest

from batchinfer.survey.counts import Example
from batchinfer.survey.duplicates import Duplicates
from batchinfer.survey.prompts import PromptSurvey, error_of_mean

SURVEY = PromptSurvey(
    num_rows=1000,
    num_rows_seen=100,
    num_ranges=10,
    num_shards_seen=4,
    lengths={10: 50, 20: 40, 300: 5},
    num_tokens_to_read=2800,
    num_completions=95,
    max_new_tokens=9500,
    new_tokens_are_exact=False,
    mean_length_error=3.0,
    dead_letters={"a.parquet": {"too_long": 3, "empty_prompt": 1}, "b.parquet": {"too_long": 1}},
    examples={"too_long": [Example("s:7", "9,000 prompt tokens")]},
    duplicates=Duplicates(95, 19, 19, 190, is_estimate=False),
)


def test_lengths_are_summed_up() -> None:
    assert (SURVEY.num_prompts, SURVEY.num_tokens, SURVEY.longest) == (95, 2800, 300)
    assert SURVEY.mean_length == pytest.approx(2800 / 95)
    assert SURVEY.percentiles() == {50: 10, 90: 20, 99: 300}
    assert SURVEY.histogram() == [(1, 16, 50), (17, 32, 40), (33, 64, 0), (65, 128, 0), (129, 256, 0), (257, 512, 5)]
    nothing = replace(SURVEY, lengths={})
    assert (nothing.mean_length, nothing.longest, nothing.percentiles(), nothing.histogram()) == (0.0, 0, {}, [])


@pytest.mark.parametrize(("length", "expected"), [(1, (1, 16)), (16, (1, 16)), (17, (17, 32)), (32, (17, 32))])
def test_every_length_has_its_bar(length: int, expected: tuple[int, int]) -> None:
    ((shortest, longest, _),) = replace(SURVEY, lengths={length: 1}).histogram()
    assert (shortest, longest) == expected


def test_a_sample_is_projected_to_all_rows_and_says_that_it_is_one() -> None:
    written = SURVEY.as_json()
    assert written["is_full"] is False
    assert written["prompt_tokens"]["total_estimate"] == 28_000  # type: ignore[index]
    assert written["max_new_tokens_estimate"] == 95_000
    dead = written["dead_letters"]["too_long"]  # type: ignore[index]
    assert (dead["num_rows_seen"], dead["num_rows_estimate"]) == (4, 40)
    assert dead["examples"] == [{"row_id": "s:7", "error": "9,000 prompt tokens"}]
    assert written["duplicates"]["is_lower_bound"] is True  # type: ignore[index]
    assert replace(SURVEY, num_rows_seen=1000).as_json()["duplicates"]["is_lower_bound"] is False  # type: ignore[index]


def test_the_error_of_a_mean_is_taken_between_ranges() -> None:
    assert error_of_mean([(16, 160)]) is None
    assert error_of_mean([(16, 160), (0, 0)]) is None
    assert error_of_mean([(16, 160), (16, 160)]) == 0.0
    # Means of 8, 12, 8 and 12: a deviation of 2.31, and of their mean half of that.
    assert error_of_mean([(16, 128), (16, 192), (16, 128), (16, 192)]) == pytest.approx(2 * 2.3094 / 2, rel=1e-3)
