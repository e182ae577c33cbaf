"""The project's own prompts in jobs/prompts: what the demo and every ready job file run on."""

from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.job_file import load_job
from batchinfer.planner import plan_input
from batchinfer.prompts import check_schema
from batchinfer.prompts.columns import json_text_columns
from tests.tiny import EXAONE3_TEMPLATE

JOBS = Path(__file__).parents[2] / "jobs"
SHARDS = sorted((JOBS / "prompts").iterdir())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    found: list[dict[str, object]] = pa.concat_tables(pq.read_table(shard) for shard in SHARDS).to_pylist()
    return found


def test_there_are_three_shards_and_nothing_else() -> None:
    assert [shard.name for shard in SHARDS] == [f"part-{index:05d}.parquet" for index in range(3)]


def test_every_shard_has_the_same_plain_schema() -> None:
    for shard in SHARDS:
        schema = pq.read_schema(shard)
        assert schema.names == ["id", "language", "topic", "prompt", "messages"]
        assert [str(schema.field(name).type) for name in schema.names[:4]] == ["string"] * 4


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_ready_job_file_fits_the_rows_it_names(path: Path) -> None:
    spec = load_job(path, environment={})
    (name,) = spec.input.paths
    found = plan_input([str(JOBS.parent / name)], None, 1024, json_text_columns=json_text_columns(spec.prompt))
    assert found.schemas
    for each in found.schemas:
        check_schema(spec.prompt, spec.sampling, each.schema, each.example.path)
        assert set(spec.output.columns or ()) <= set(each.schema.names)


def test_both_languages_are_there_in_at_least_sixty_six_distinct_rows(rows: list[dict[str, object]]) -> None:
    assert len(rows) >= 66
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    for language in ("en", "ko"):
        assert sum(row["language"] == language for row in rows) >= 30
    for row in rows:
        hangul = any("가" <= character <= "힣" for character in str(row["prompt"]))
        assert hangul == (row["language"] == "ko")


def test_conversations_vary_and_end_with_the_user(rows: list[dict[str, object]]) -> None:
    shapes = set()
    for row in rows:
        messages = row["messages"]
        assert isinstance(messages, list)
        assert messages[-1] == {"role": "user", "content": row["prompt"]}
        shapes.add("".join(message["role"][0] for message in messages))
    assert {"u", "su", "uau", "suauau"} <= shapes


def test_every_conversation_renders_with_exaone_3s_template(rows: list[dict[str, object]]) -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(EXAONE3_TEMPLATE)
    for row in rows:
        text = template.render(messages=row["messages"], add_generation_prompt=True)
        assert text.startswith("[|system|]")
        assert text.endswith(f"[|user|]{row['prompt']}\n[|assistant|]")
