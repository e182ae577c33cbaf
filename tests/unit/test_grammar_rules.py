"""Which schemas and patterns are taken, what a pattern means, and that none takes long to judge."""

import json
import re
import time

import pytest

from batchinfer.grammar_rules import _in_both_dialects, grammar, problem, refuse
from batchinfer.records import SamplingParams

DEEP: dict[str, object] = {"type": "integer"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}


def of_schema(schema: object) -> SamplingParams:
    return SamplingParams(json_schema=json.dumps(schema, ensure_ascii=False))


def test_params_without_a_grammar_have_no_problem() -> None:
    assert problem(SamplingParams()) == refuse(SamplingParams()) == ""


@pytest.mark.parametrize(
    "params",
    [
        of_schema({"type": "object", "properties": {"이름": {"type": "string"}}, "additionalProperties": False}),
        of_schema({"$defs": {"t": {"enum": ["a", 1, None]}}, "type": "array", "items": {"$ref": "#/$defs/t"}}),
        of_schema({}),
        SamplingParams(regex=r"^[가-힣]{2,5}\d+(원|dollars?)$"),
        SamplingParams(regex=r"\p{Hangul}+"),
        # Far from cheap to expand, and never expanded.
        SamplingParams(regex="(a|b)*a(a|b){40}"),
        of_schema({"type": "array", "minItems": 100_000, "items": {"type": "string", "maxLength": 10**7}}),
    ],
)
def test_what_jobs_use_is_taken(params: SamplingParams) -> None:
    assert problem(params) == ""
    assert json.loads(grammar(params))["grammars"]
    key = "regex" if params.regex else "json_schema"
    assert refuse(params).startswith(f"{key}: the fake engine")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (SamplingParams(regex="(a|b"), "regex: .*unclosed group"),
        (SamplingParams(regex=r"(?=a)b"), "regex: .*look-ahead"),
        (SamplingParams(regex=r"(a)\1"), "regex: .*backreferences"),
        (SamplingParams(regex="a" * 3000), "regex: 3,000 characters"),
        (of_schema({"type": "sting"}), "json_schema: Invalid type"),
        (of_schema({"type": "string", "format": "phone"}), "json_schema: Unknown format"),
        (of_schema({"not": {"type": "string"}}), "json_schema: Unimplemented keys"),
        (of_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "json_schema: oneOf"),
        (of_schema({"enum": []}), "json_schema: Unsatisfiable"),
        (of_schema({"$ref": "https://example.com/s.json"}), "json_schema: .*not present"),
        (of_schema({"const": "x" * 70_000}), "json_schema: 70,013 characters"),
        (of_schema({"type": "string", "pattern": "a?" * 1100}), "json_schema: its patterns have 2,200"),
        (of_schema({"type": "object", "patternProperties": {"b?" * 1100: {}}}), "json_schema: its patterns have"),
        (of_schema({"type": "integer", "multipleOf": 999_983}), "json_schema: its multipleOf"),
        (of_schema({"type": "number", "multipleOf": 0.25}), None),
        (of_schema(DEEP), "json_schema: .*recursion"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_reason(params: SamplingParams, text: str | None) -> None:
    found = problem(params)
    assert len(found) < 400
    if text is None:
        assert found == ""
    else:
        assert re.match(text, found), found


def test_a_schema_cannot_make_itself_lenient() -> None:
    lax = {"x-guidance": {"lenient": True}, "not": {"type": "string"}}
    assert "Unimplemented keys" in problem(of_schema(lax))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(regex="(" * 1000 + "a" + ")" * 1000),
        SamplingParams(regex="((((a{1,100}){1,100}){1,100}){1,100})"),
        SamplingParams(regex=".*" * 1024),
        of_schema({"enum": [f"value {index}" for index in range(3000)]}),
        of_schema({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(1500)}}),
        of_schema({"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i + 99}]} for i in range(30)]}),
        of_schema({"$ref": "#"}),
        of_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        of_schema({"$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}}),
    ],
)
def test_none_takes_long_to_judge(params: SamplingParams) -> None:
    started_s = time.thread_time()
    problem(params)
    assert time.thread_time() - started_s < 2.0


@pytest.mark.parametrize(
    ("pattern", "spelt_out"),
    [
        (r"^\d+$", r"^[0-9]+$"),
        (r"[\w-]+\s\S", r"[[\p{L}\p{Nd}_]-]+[ \t\n\r\f\v][^\s\x1c-\x1f]"),
        (r"[^\w]\D\W[\]\d]", r"[^[\w\p{N}]][^\p{Nd}][^\w\p{N}][\][0-9]]"),
        (r"[]\d]x[^]\s]", r"[][0-9]]x[^][\s\x1c-\x1f]]"),
        (r"[a[^\d]]", r"[a[^[\p{Nd}]]]"),
        (r"\\d\[\d", r"\\d\[[0-9]"),
        ("a\\", "a\\"),
    ],
)
def test_shorthands_are_spelt_out_and_nothing_else(pattern: str, spelt_out: str) -> None:
    assert _in_both_dialects(pattern) == spelt_out
