"""Jobs whose completions are JSON of a schema or matches of a pattern, from job file to Parquet."""

import json
import re
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from batchinfer.audit import verify_deep
from tests.jobs import command, job_values, read_dead_letters, read_rows, write_job_file

pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).parents[2]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}, "s": {"type": "string", "maxLength": 4}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
LIST = json.dumps({"type": "array", "items": {"enum": ["가", "b"]}, "minItems": 1, "maxItems": 2}, ensure_ascii=False)
#: What each row says for itself, and the dead letter it becomes.
ROWS: list[tuple[dict[str, str | None] | None, str | None]] = [
    (None, None),
    ({"regex": r"\d{2}-[가나다]{3}", "json_schema": None}, None),
    ({"regex": None, "json_schema": LIST}, None),
    ({"regex": "a", "json_schema": LIST}, "bad_sampling"),
    ({"regex": "(a", "json_schema": None}, "bad_sampling"),
    ({"regex": None, "json_schema": '{"type": "object"'}, "bad_sampling"),
    ({"regex": None, "json_schema": '{"not": {}}'}, "bad_sampling"),
    ({"regex": None, "json_schema": None}, None),
]


def expected_form(override: dict[str, str | None] | None, text: str) -> None:
    if override and override["regex"]:
        assert re.fullmatch(override["regex"], text), text
    else:
        schema = json.loads(override["json_schema"]) if override and override["json_schema"] else SCHEMA
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", ["continuous", pytest.param("padded", marks=pytest.mark.slow)])
def test_each_row_is_held_to_its_own_form_or_to_the_jobs(exaone: Path, tmp_path: Path, kind: str) -> None:
    sampling = pa.struct([("regex", pa.string()), ("json_schema", pa.string())])
    columns = {
        "id": pa.array(range(len(ROWS))),
        "prompt": pa.array([f"{index}: hi" for index in range(len(ROWS))]),
        "s": pa.array([override for override, _ in ROWS], sampling),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    values = job_values(
        exaone,
        tmp_path / "rows.parquet",
        tmp_path / "out",
        prompt={"sampling_column": "s"},
        sampling={"max_new_tokens": 80, "json_schema": SCHEMA, "temperature": 0.7},
        engine={"kind": kind},
    )
    file = write_job_file(tmp_path / "job.yaml", values)
    ended = command("run", file)
    assert ended.exit_code == 1, ended.output
    dead = [error_type for _, error_type in read_dead_letters(tmp_path / "out")]
    assert sorted(dead) == sorted(kind for _, kind in ROWS if kind is not None)
    rows = read_rows(tmp_path / "out")
    assert [index for index, *_ in rows] == [index for index, (_, kind) in enumerate(ROWS) if kind is None]
    for index, _, text, reason in rows:
        assert isinstance(index, int)
        assert reason == "stop"
        expected_form(ROWS[index][0], str(text))
    assert verify_deep(str(tmp_path / "out")).findings == ()
    again = command("retry-failed", file)
    assert again.exit_code == 1, again.output
    assert read_rows(tmp_path / "out") == rows


def test_the_ready_job_extracts_valid_json(exaone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table = pq.read_table("jobs/prompts", columns=["id", "prompt"])
    shortest = sorted(table.to_pylist(), key=lambda row: len(row["prompt"].encode()))[:3]
    pq.write_table(pa.Table.from_pylist(shortest), tmp_path / "rows.parquet")
    overrides = {
        "model.path": exaone,
        "model.dtype": "float32",
        "input.path": tmp_path / "rows.parquet",
        "output.path": tmp_path / "out",
        "cluster.num_cpus": 1,
        # The tiny tokenizer spells every byte: the template as it is leaves too little room.
        "prompt.template": "{{ prompt }}",
    }
    ended = command(
        "run",
        "jobs/extract-json.yaml",
        *(part for key, value in overrides.items() for part in ("--set", f"{key}={value}")),
    )
    assert ended.exit_code == 0, ended.output
    schema = yaml.safe_load(Path("jobs/extract-json.yaml").read_text(encoding="utf-8"))["sampling"]["json_schema"]
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 3
    for _, _, text, reason in rows:
        if reason == "stop":
            found = json.loads(str(text))
            jsonschema.validate(found, schema)
            assert list(found) == schema["required"]
    assert "stop" in {reason for *_, reason in rows}


def test_a_schema_that_does_not_compile_and_the_fake_engine_are_refused_by_plan(exaone: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "rows.parquet")

    def planned(**blocks: dict[str, object]) -> str:
        values = job_values(exaone, tmp_path / "rows.parquet", tmp_path / "out", **blocks)
        ended = command("plan", write_job_file(tmp_path / "job.yaml", values))
        assert ended.exit_code == 2
        return " ".join(ended.output.split())

    assert "sampling.json_schema: Invalid type: sting" in planned(sampling={"json_schema": {"type": "sting"}})
    assert "sampling.regex: at 1(8)" in planned(sampling={"regex": "(a"})
    assert "the fake engine" in planned(sampling={"regex": "a"}, engine={"kind": "fake"})
    assert "leave out stop" in planned(sampling={"regex": "a", "stop": ["x"]})
    assert "leave out min_new_tokens, ignore_eos" in planned(
        sampling={"json_schema": SCHEMA, "min_new_tokens": 3, "ignore_eos": True}
    )
    assert "not both" in planned(sampling={"regex": "a", "json_schema": "{}"})
    assert "a schema is a JSON object" in planned(sampling={"json_schema": "[]"})
