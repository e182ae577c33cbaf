"""A row's own schema or pattern over the job's, and which combinations are contradictions."""

import json
from collections.abc import Mapping

import pytest
from pydantic import ValidationError

from batchinfer.errors import RowRejected, SpecError
from batchinfer.prompts import sampling as row_sampling
from batchinfer.prompts.sampling import RowSampling
from batchinfer.records import SamplingParams
from batchinfer.spec import SamplingSpec, canonical_schema

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "가"}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"const":"가"}}}'


def rows(job: Mapping[str, object], *, decodes: bool = True) -> RowSampling:
    return RowSampling(SamplingSpec.model_validate(job), 100, decodes=decodes)


def test_a_schema_is_one_text_however_it_is_written() -> None:
    assert canonical_schema(SCHEMA) == canonical_schema(json.dumps(SCHEMA, indent=3)) == TEXT
    assert SamplingSpec(json_schema=SCHEMA).params() == SamplingSpec(json_schema=TEXT).params()
    assert rows({}).params({"json_schema": SCHEMA}) == rows({}).params({"json_schema": TEXT})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"json_schema": TEXT, "regex": "a"}, "not both"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "[1]"}, "a schema is a JSON object"),
        ({"json_schema": {"const": float("nan")}}, "not JSON compliant"),
        ({"json_schema": {"const": object()}}, "put quotes around it"),
        ({"json_schema": "[" * 100_000}, "nested too deep"),
        ({"regex": ""}, "at least 1 character"),
        ({"regex": "a", "stop": ["x"]}, "with regex .* leave out stop"),
        ({"json_schema": TEXT, "min_new_tokens": 1}, "with json_schema .* leave out min_new_tokens"),
        ({"json_schema": TEXT, "ignore_eos": True, "stop": ["."]}, "leave out stop, ignore_eos"),
        ({"regex": "a", "choices": ["x", "y"]}, "choices are scored as they are; leave out regex"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        SamplingSpec.model_validate(values)


def test_a_rows_own_form_takes_the_place_of_the_jobs() -> None:
    held = rows({"json_schema": TEXT, "temperature": 0.5})
    assert held.params(None).json_schema == TEXT
    assert held.params({"json_schema": None, "regex": None}).json_schema == TEXT
    own = held.params({"regex": "[ab]", "json_schema": None})
    assert (own.regex, own.json_schema, own.temperature) == ("[ab]", None, 0.5)
    assert held.params({"choices": ["a", "b"]}) == SamplingParams(choices=("a", "b"), temperature=0.5)
    assert rows({"choices": ["a", "b"]}).params({"regex": "x"}) == SamplingParams(regex="x")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"regex": "(a"}, "regex: .*unclosed"),
        ({"json_schema": '{"type": "sting"}'}, "json_schema: Invalid type"),
        ({"json_schema": "{"}, "json_schema: not JSON"),
        ({"regex": "a", "json_schema": TEXT}, "not both"),
        ({"regex": "a", "min_new_tokens": 2}, "leave out min_new_tokens"),
        ({"regex": "a?" * 2000}, "regex: 4,000 characters"),
    ],
)
def test_a_rows_bad_form_is_its_own_dead_letter(override: dict[str, object], text: str) -> None:
    held = rows({})
    for _ in range(2):
        with pytest.raises(RowRejected, match=text) as caught:
            held.params(override)
        assert caught.value.error_type == "bad_sampling"


def test_a_jobs_bad_form_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match=r"sampling\.regex: .*unclosed"):
        rows({"regex": "(a"})
    with pytest.raises(SpecError, match="need a tokenizer"):
        rows({"regex": "a"}, decodes=False)


def test_what_is_kept_of_rows_forms_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sampling, "_MAX_CACHED_CHARS", 1000)
    checked: list[SamplingParams] = []

    def check(params: SamplingParams) -> str:
        checked.append(params)
        return ""

    held = RowSampling(SamplingSpec(), 100, decodes=True, check_grammar=check)
    for _ in range(2):
        assert held.params({"regex": "a" * 600}).regex == "a" * 600
    assert len(checked) == 2
    for letter in "bc":
        held.params({"regex": letter * 600})
    held.params({"regex": "a" * 600})
    assert len(checked) == 5
