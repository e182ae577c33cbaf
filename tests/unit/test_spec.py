"""What the job file's types accept and refuse."""

import dataclasses
import pickle

import pytest
from pydantic import ValidationError

from batchinfer.records import GENERATED_COLUMNS, SamplingParams
from batchinfer.spec import (
    RESERVED_TEMPLATE_KWARGS,
    ExecutionSpec,
    InputSpec,
    JobSpec,
    ModelSpec,
    OutputSpec,
    PromptSpec,
    SamplingSpec,
)


def job(**blocks: object) -> JobSpec:
    values = {"model": {"path": "m"}, "input": {"path": "i"}, "prompt": {"text": "p"}, "output": {"path": "o"}}
    return JobSpec.model_validate(values | blocks)


def test_the_smallest_job_has_defaults_for_the_rest() -> None:
    spec = job()
    assert spec.sampling == SamplingSpec()
    assert spec.execution.rows_per_unit == 1024
    assert spec.model.dtype == "bfloat16"


def test_a_job_can_be_built_from_its_types_and_pickled() -> None:
    spec = JobSpec(
        model=ModelSpec(path="m"),
        input=InputSpec(path=["a", "b"]),
        prompt=PromptSpec(messages="messages", system="Be brief."),
        output=OutputSpec(path="o"),
    )
    assert spec.input.paths == ("a", "b")
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_specs_cannot_be_changed_after_reading() -> None:
    with pytest.raises(ValidationError):
        job().sampling.n = 2  # type: ignore[misc]


def test_sampling_defaults_are_the_engines_defaults() -> None:
    assert SamplingSpec().params() == SamplingParams()
    assert set(SamplingSpec.model_fields) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_sampling_params_keep_every_value() -> None:
    values: dict[str, object] = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "n": 3,
        "seed": -4,
        "stop": ["a"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logprobs": 2,
    }
    params = dataclasses.asdict(SamplingSpec.model_validate(values).params())
    unset = {"choices": (), "json_schema": None, "regex": None}
    assert params == values | {"stop": ("a",), "stop_token_ids": (7,)} | unset
    assert SamplingSpec(choices=["yes", "no"]).params() == SamplingParams(choices=("yes", "no"))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ({}, "given: none"),
        ({"text": "a", "messages": "b"}, "given: text, messages"),
        ({"messages": "a", "chat": False}, "messages need the chat template"),
        ({"token_ids": "a", "chat": True}, "read as they are"),
        ({"token_ids": "a", "system": "s"}, "read as they are"),
        ({"text": "a", "system": "s"}, "set chat: true"),
        ({"text": "a", "chat_template_kwargs": {"enable_thinking": True}}, "set chat: true"),
        ({"messages": "a", "chat_template_kwargs": {"tokenize": True, "messages": []}}, "messages, tokenize"),
    ],
)
def test_prompt_blocks_that_contradict_themselves_are_refused(prompt: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PromptSpec.model_validate(prompt)


@pytest.mark.parametrize(
    ("prompt", "applies"),
    [
        ({"text": "a"}, False),
        ({"text": "a", "chat": True}, True),
        ({"messages": "a"}, True),
        ({"template": "a"}, True),
        ({"template": "a", "chat": False}, False),
        ({"token_ids": "a"}, False),
        ({"token_ids": "a", "chat": False}, False),
    ],
)
def test_chat_defaults_follow_the_prompts_source(prompt: dict[str, object], applies: bool) -> None:
    assert PromptSpec.model_validate(prompt).applies_chat_template is applies


def test_thinking_is_no_reserved_argument() -> None:
    assert not {"enable_thinking", "tools", "documents"} & RESERVED_TEMPLATE_KWARGS


@pytest.mark.parametrize(
    "sampling",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": 6, "max_new_tokens": 5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "0.5"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": True},
        {"n": 1.0},
        {"seed": 2**63},
        {"stop": "end"},
        {"stop": [""]},
        {"stop_token_ids": [-1]},
        {"logprobs": 101},
        {"temprature": 1.0},
    ],
)
def test_sampling_outside_its_range_is_refused(sampling: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SamplingSpec.model_validate(sampling)


@pytest.mark.parametrize("columns", [["id", "id"], [""], [GENERATED_COLUMNS[0]], ["id", "completion"]])
def test_output_columns_must_be_distinct_and_not_the_jobs_own(columns: list[str]) -> None:
    with pytest.raises(ValidationError):
        OutputSpec(path="o", columns=columns)


@pytest.mark.parametrize("path", ["", [], ["a", ""], 3, None])
def test_input_paths_must_say_something(path: object) -> None:
    with pytest.raises(ValidationError):
        InputSpec.model_validate({"path": path})


def test_a_replica_holds_at_least_two_units() -> None:
    with pytest.raises(ValidationError):
        ExecutionSpec(units_in_flight=1)
