"""What makes two jobs the same job."""

import json
from typing import Any

import pytest

from batchinfer.fingerprint import ADDED_KEYS, Fingerprint, diff, fingerprint, redacted_spec
from batchinfer.spec import JobSpec

IDENTITY = {"config": "c0ffee", "weights": "abc"}
BASE: dict[str, Any] = {
    "model": {"path": "m"},
    "input": {"path": "i"},
    "prompt": {"messages": "messages"},
    "output": {"path": "o"},
}


def job(**changes: object) -> JobSpec:
    """BASE with ``block__key=value`` changes."""
    values: dict[str, Any] = {name: dict(block) for name, block in BASE.items()}
    for dotted, value in changes.items():
        *blocks, key = dotted.split("__")
        here = values
        for block in blocks:
            here = here.setdefault(block, {})
        here[key] = value
    return JobSpec.model_validate(values)


def of(**changes: object) -> Fingerprint:
    return fingerprint(job(**changes), IDENTITY)


def test_the_digest_is_sixteen_hex_digits_and_stable() -> None:
    first = of()
    assert first == of()
    assert len(first.digest) == 16
    assert set(first.digest) <= set("0123456789abcdef")
    # Pinned: a change here makes every output of earlier versions another job's.
    assert first.digest == "8d4f89539a83c4a3"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model__dtype": "float32"}, "model.dtype"),
        ({"model__max_model_len": 64}, "model.max_model_len"),
        ({"engine__kind": "fake"}, "engine.fake"),
        ({"prompt__system": "Be brief."}, "prompt.system"),
        ({"prompt__chat_template_kwargs": {"enable_thinking": True}}, "prompt.chat_template_kwargs"),
        ({"prompt__sampling_column": "s"}, "prompt.sampling_column"),
        ({"sampling__temperature": 0.7}, "sampling.temperature"),
        ({"sampling__seed": 1}, "sampling.seed"),
        ({"sampling__stop": ["x"]}, "sampling.stop"),
        ({"output__columns": ["id"]}, "output.columns"),
        ({"output__token_ids": True}, "output.token_ids"),
    ],
)
def test_what_changes_the_rows_changes_the_fingerprint(changes: dict[str, object], name: str) -> None:
    base, changed = of(), of(**changes)
    assert changed.digest != base.digest
    assert {part for part in base.parts if base.parts[part] != changed.parts[part]} == {name}


def test_another_model_changes_the_fingerprint() -> None:
    assert fingerprint(job(), IDENTITY | {"weights": "abd"}).digest != of().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"model__path": "/elsewhere/m"},
        {"model__device": "cpu"},
        {"model__storage_options": {"key": "x"}},
        {"input__path": ["a", "b"]},
        {"input__storage_options": {"key": "x"}},
        {"output__path": "elsewhere"},
        {"output__compression": "gzip"},
        {"output__storage_options": {"key": "x"}},
        {"engine__kind": "padded"},
        {"engine__max_batch_rows": 3},
        {"engine__fake": {"error_rate": 0.5, "tokens_per_s": 9.0}},
        {"cluster__replicas": 4},
        {"execution__rows_per_unit": 7},
        {"prompt__chat": True},  # what messages mean anyway
        {"sampling__temperature": 0},
    ],
)
def test_what_changes_no_row_changes_nothing(changes: dict[str, object]) -> None:
    assert of(**changes) == of()


def test_every_prompt_and_sampling_field_is_a_part() -> None:
    spec, parts = job(), of().parts
    names = [f"prompt.{name}" for name in type(spec.prompt).model_fields]
    names += [f"sampling.{name}" for name in type(spec.sampling).model_fields]
    assert set(names) - set(ADDED_KEYS) <= set(parts)
    assert all(isinstance(json.loads(text), object) for text in parts.values())


def test_keys_added_later_count_once_they_say_something() -> None:
    spec = job()
    defaults = {f"prompt.{name}": value for name, value in spec.prompt.model_dump().items()}
    defaults |= {f"sampling.{name}": value for name, value in spec.sampling.model_dump().items()}
    assert {name: defaults[name] for name in ADDED_KEYS} == ADDED_KEYS
    assert not set(ADDED_KEYS) & set(of().parts)
    steered = of(sampling__regex="a|b")
    assert steered.parts.items() - of().parts.items() == {("sampling.regex", '"a|b"')}
    assert steered.digest != of().digest


def test_a_schema_is_its_members_in_their_order_however_it_is_written() -> None:
    members = {"b": {"type": "integer"}, "a": {"type": "string"}}
    schema = {"type": "object", "properties": members}
    turned = {"type": "object", "properties": dict(reversed(members.items()))}
    assert of(sampling__json_schema=schema) == of(sampling__json_schema=json.dumps(schema, indent=1))
    assert of(sampling__json_schema=schema) != of(sampling__json_schema=turned)


def test_the_diff_names_what_changed_on_both_sides() -> None:
    lines = diff(of(prompt__system="A").parts, of(sampling__temperature=0.7).parts)
    assert lines == [
        'prompt.system: "A" in the output, null in the job',
        "sampling.temperature: 0.0 in the output, 0.7 in the job",
    ]
    assert diff(of().parts, of().parts) == []


def test_the_diff_names_parts_that_only_one_side_has() -> None:
    assert diff({"a": "1"}, {"b": "2"}) == [
        "a: 1 in the output, absent in the job",
        "b: absent in the output, 2 in the job",
    ]


def test_long_values_are_shortened_around_their_first_difference() -> None:
    old, new = "x" * 500 + "OLD" + "y" * 500, "x" * 500 + "NEW" + "y" * 500
    (line,) = diff({"t": old}, {"t": new})
    assert len(line) < 250
    assert "OLD" in line
    assert "NEW" in line
    (line,) = diff({"t": "z" * 300}, {"t": "z" * 301})
    assert "..." in line


def test_the_redacted_spec_holds_no_credentials_and_is_json() -> None:
    spec = job(
        model__path="s3://key:hush@bucket/m",
        model__storage_options={"secret": "hush", "client_kwargs": {"token": "hush"}},
        input__path=["s3://key:hush@bucket/a", "b"],
        output__path="https://host/o?sig=hush",
        output__storage_options={"secret": "hush"},
        cluster__address="ray://user:hush@head:10001",
    )
    clean = redacted_spec(spec)
    text = json.dumps(clean)
    assert "hush" not in text
    assert '"secret": "***"' in text
    assert '"s3://***@bucket/a", "b"' in text
    assert clean["name"] == "job"
    assert redacted_spec(job())["input"] == {"path": "i", "format": "auto", "storage_options": {}}
