"""``sampling.choices`` on the way from job file and rows to prompts: what is tokenised, what is refused, where."""

import re

import pyarrow as pa
import pytest

from batchinfer.errors import InputError, RowRejected, SpecError
from batchinfer.planner import InputSchema, columns_to_read
from batchinfer.prompts import PromptRenderer
from batchinfer.prompts.choices import ChoiceTokenizer
from batchinfer.prompts.columns import check_schema, scores_choices
from batchinfer.records import Prompt, RowError, SamplingParams, Shard
from batchinfer.spec import JobSpec, SamplingSpec
from tests.unit.test_prompts import (
    EXAONE3_TEMPLATE,
    TOKENIZER,
    VOCAB_SIZE,
    byte_tokenizer,
    chat_tokenizer,
    render,
    spec,
)

ROOMY = 2048


def renderer(limit: int = ROOMY, **sampling: object) -> PromptRenderer:
    return PromptRenderer(
        spec(text="c", sampling_column="s"), SamplingSpec.model_validate(sampling), TOKENIZER, limit, VOCAB_SIZE
    )


def rows(*own: list[str] | None) -> pa.Table:
    kind = pa.struct({"choices": pa.list_(pa.string())})
    return pa.table(
        {"c": ["hi"] * len(own), "s": pa.array([None if it is None else {"choices": it} for it in own], kind)}
    )


def spelled(prompt: Prompt | RowError) -> list[str]:
    assert isinstance(prompt, Prompt), prompt
    return [str(TOKENIZER.decode(list(ids), skip_special_tokens=False)) for ids in prompt.choice_token_ids]


def test_choices_are_tokenised_by_themselves_and_stand_beside_the_prompt() -> None:
    tokenizer = chat_tokenizer(EXAONE3_TEMPLATE)
    asking = PromptRenderer(
        spec(messages="c"), SamplingSpec(choices=["yes", " no", "ㄱ"]), tokenizer, ROOMY, VOCAB_SIZE
    )
    plain = PromptRenderer(spec(messages="c"), SamplingSpec(), tokenizer, ROOMY, VOCAB_SIZE)
    chats = [[{"role": "user", "content": "Hi"}]]
    (prompt,), (without,) = render(asking, values=chats), render(plain, values=chats)
    assert isinstance(prompt, Prompt)
    assert isinstance(without, Prompt)
    assert prompt.token_ids == without.token_ids
    assert prompt.sampling == SamplingParams(choices=("yes", " no", "ㄱ"))
    assert spelled(prompt) == ["yes", " no", "ㄱ"]
    assert without.choice_token_ids == ()


def test_a_tokenizer_that_adds_bos_adds_none_to_choices_and_a_control_token_in_one_is_one() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    (yes, end) = ChoiceTokenizer(tokenizer, VOCAB_SIZE).token_ids(("yes", "A[|endofturn|]"))
    assert (len(yes), len(end)) == (3, 2)
    assert end[-1] == tokenizer.convert_tokens_to_ids("[|endofturn|]")


def test_rows_bring_their_own_over_the_jobs() -> None:
    prompts = renderer(choices=["a", "b"]).render(rows(None, ["up", "down"], ["left"]), ["s:0", "s:1", "s:2"])
    assert [spelled(prompt) for prompt in prompts] == [["a", "b"], ["up", "down"], ["left"]]


@pytest.mark.parametrize(("limit", "kind"), [(7, ""), (6, "too_long"), (3, "too_long")])
def test_the_longest_choice_must_fit_behind_the_prompt(limit: int, kind: str) -> None:
    (prompt,) = renderer(limit, choices=["a", "seven"]).render(rows(None), ["s:0"])
    assert kind == (prompt.error_type if isinstance(prompt, RowError) else "")


def test_max_new_tokens_does_not_cut_choices() -> None:
    (prompt,) = renderer(choices=["a", "seventeen"], max_new_tokens=1).render(rows(None), ["s:0"])
    assert spelled(prompt) == ["a", "seventeen"]


class OddTokenizer:
    """Drops dashes, folds case, and knows ids that the model does not."""

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[ord(letter) for letter in text.lower().replace("-", "")] for text in texts]}


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (("yes", "-"), "'-' has no tokens"),
        (("yes", "no", "Yes"), "'yes' and 'Yes' are the same tokens"),
        (("yes", "é"), "token id 233 of 'é' is outside the model's 128"),
    ],
)
def test_choices_that_cannot_be_told_apart_or_scored_are_refused(choices: tuple[str, ...], problem: str) -> None:
    tokenizer = ChoiceTokenizer(OddTokenizer(), vocab_size=128)  # type: ignore[arg-type]
    with pytest.raises(RowRejected, match=re.escape(problem)) as refused:
        tokenizer.token_ids(choices)
    assert refused.value.error_type == "bad_sampling"


def test_a_jobs_own_bad_choices_are_found_before_any_row() -> None:
    small = PromptRenderer
    with pytest.raises(SpecError, match=r"sampling\.choices: token id .* outside the model's 20 token ids"):
        small(spec(text="c"), SamplingSpec(choices=["yes"]), TOKENIZER, ROOMY, 20)
    with pytest.raises(SpecError, match=r"sampling\.choices: .*need a tokenizer"):
        small(spec(token_ids="c"), SamplingSpec(choices=["yes"]), None, ROOMY, 20)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"choices": ["a", "b", "a"]}, "'a' are there twice"),
        ({"choices": ["a"], "n": 2}, "leave out n: 2"),
        ({"choices": ["a"], "stop": ["x"]}, "leave out stop"),
        ({"choices": ["a", ""]}, "at least 1 character"),
        ({"choices": ["a"], "regex": "a|b"}, "leave out regex"),
        ({"choices": ["a"], "json_schema": {"type": "object"}}, "leave out json_schema"),
    ],
)
def test_what_choices_do_not_go_with_is_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SamplingSpec.model_validate(values)


def test_a_job_without_choices_is_the_job_it_was() -> None:
    assert SamplingSpec(choices=[]) == SamplingSpec()
    assert SamplingSpec(choices=[]).params() == SamplingParams()


def test_the_column_of_scores_is_there_where_rows_may_have_choices() -> None:
    own = pa.schema({"c": pa.string(), "s": pa.struct({"choices": pa.list_(pa.string())})})
    other = pa.schema({"c": pa.string(), "s": pa.struct({"seed": pa.int64()})})
    by_row, plain = spec(text="c", sampling_column="s"), spec(text="c")
    assert scores_choices(plain, SamplingSpec(choices=["a"]), other)
    assert scores_choices(by_row, SamplingSpec(), own)
    assert not scores_choices(by_row, SamplingSpec(), other)
    assert not scores_choices(plain, SamplingSpec(), own)
    assert not scores_choices(by_row, SamplingSpec(), pa.schema([]))
    check_schema(by_row, SamplingSpec(), own)
    with pytest.raises(InputError, match=r"'choices' of column 's' is list<.*: int64>, expected list<string>"):
        check_schema(
            by_row, SamplingSpec(), pa.schema({"c": pa.string(), "s": pa.struct({"choices": pa.list_(pa.int64())})})
        )


def test_an_input_column_called_choices_is_in_the_way_of_scores_only() -> None:
    schema = pa.schema({"question": pa.string(), "choices": pa.list_(pa.string())})
    schemas = [InputSchema(schema, Shard("s" * 16, "a.parquet", "a.parquet", 1, 1))]
    assert columns_to_read(schemas, ["question"], None)[1] == ("question", "choices")
    assert columns_to_read(schemas, ["choices"], ["question"], ["choices"])[1] == ("question",)
    for passed in (None, ["choices"]):
        with pytest.raises(InputError, match=r"adds the columns choices itself.*output\.columns"):
            columns_to_read(schemas, ["question"], passed, ["choices"])


def test_conversations_are_answered_and_not_chosen() -> None:
    values = {
        "model": {"path": "m"},
        "input": {"path": "i"},
        "output": {"path": "o"},
        "prompt": {"turns": "c"},
        "sampling": {"choices": ["a"]},
    }
    with pytest.raises(ValueError, match="every turn is answered"):
        JobSpec.model_validate(values)
