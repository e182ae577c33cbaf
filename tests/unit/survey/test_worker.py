"""What a worker counts is what a replica would prepare."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.prepare import prepare
from batchinfer.records import WorkUnit
from batchinfer.storage.filesystem import locate
from batchinfer.storage.row_groups import read_row_groups
from batchinfer.survey.counts import RangeCounts
from batchinfer.survey.prompts import task_of
from batchinfer.survey.windows import sample_windows
from batchinfer.survey.worker import Surveyor, Task, WorkerSetup
from tests.jobs import fake_job, model_without_weights, write_input

LIMIT = 64
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_without_weights(tmp_path_factory.mktemp("survey") / "model", limit=LIMIT)


def counted(
    model: Path, rows: pa.Table | Path, tmp_path: Path, num_rows: int | None = None, **blocks: Mapping[str, object]
) -> RangeCounts:
    """Of a job over one Parquet shard, or over what lies in a directory."""
    source = rows
    if isinstance(rows, pa.Table):
        source = tmp_path / "in"
        source.mkdir()
        pq.write_table(rows, source / "a.parquet", row_group_size=10)
    assert isinstance(source, Path)
    preparation = prepare(fake_job(model, source, tmp_path / "out", **blocks))
    facts = preparation.facts
    surveyor = Surveyor(WorkerSetup(facts.spec, facts.model.directory, facts.max_model_len, facts.schema))
    if num_rows is None:
        return surveyor.count(Task(preparation.pending, preparation.plan.shards, None))
    return surveyor.count(task_of(sample_windows(preparation.pending, num_rows), preparation.plan.shards))


def test_dead_letters_are_those_of_a_replica_and_name_their_rows(model: Path, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["one", "", None, "word " * 200, "two"], "unused": [1, 2, 3, 4, 5]})
    counts = counted(model, table, tmp_path)
    (by_type,) = counts.dead_letters.values()
    assert by_type == {"empty_prompt": 1, "null_prompt": 1, "too_long": 1}
    assert counts.examples["null_prompt"][0].row_id.endswith(":2")
    assert counts.num_rows == 5
    assert sum(counts.lengths.values()) == counts.num_completions == 2


def test_a_sample_reads_its_own_rows_alone(model: Path, tmp_path: Path) -> None:
    counts = counted(model, write_input(tmp_path / "in", [300, 300]), tmp_path, num_rows=64)
    # Windows end with their row groups, which have 50 rows here.
    assert 32 < counts.num_rows <= 64
    assert len(counts.by_range) == 4


@pytest.mark.parametrize(
    ("column", "values", "blocks", "expected"),
    [
        ("ids", [[5, 6, 7], [10**6]], {"prompt": {"text": None, "token_ids": "ids"}}, (1, 1, 12)),
        ("chat", [CHAT, []], {"prompt": {"text": None, "messages": "chat"}}, (1, 1, 12)),
        ("prompt", ["one", "two"], {"sampling": {"n": 3}}, (2, 6, 72)),
        ("turns", [["a", "b"], ["c"]], {"prompt": {"text": None, "turns": "turns"}}, (2, 2, 36)),
        (
            "body",
            ['{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}', "no JSON"],
            {"prompt": {"text": None, "request": "body"}},
            (1, 1, 7),
        ),
    ],
    ids=["token ids", "messages", "samples", "turns", "requests"],
)
def test_every_kind_of_prompt_is_counted(
    model: Path, tmp_path: Path, column: str, values: list[Any], blocks: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    counts = counted(model, pa.table({column: values}), tmp_path, **blocks)
    assert (sum(counts.lengths.values()), counts.num_completions, counts.max_new_tokens) == expected


def test_choices_are_counted_by_their_own_tokens(model: Path, tmp_path: Path) -> None:
    counts = counted(
        model,
        pa.table({"prompt": ["one", "two"]}),
        tmp_path,
        sampling={"choices": ["yes", "no"], "max_new_tokens": 500},
    )
    assert counts.num_chosen == counts.num_completions == 2
    assert 4 <= counts.max_new_tokens < 40


def test_lines_are_counted_as_rows_of_parquet_are(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "in"
    directory.mkdir()
    lines = [f'{{"prompt": "text {number}"}}' for number in range(200)]
    lines[7] = "no JSON"
    (directory / "a.jsonl").write_text("\n".join(lines) + "\n")
    counts = counted(model, directory, tmp_path, input={"format": "jsonl"})
    assert (counts.num_rows, sum(counts.lengths.values())) == (200, 199)
    (by_type,) = counts.dead_letters.values()
    assert sum(by_type.values()) == 1
    (tmp_path / "again").mkdir()
    sampled = counted(model, directory, tmp_path / "again", num_rows=32, input={"format": "jsonl"})
    assert sampled.num_rows == 32


def test_rows_behind_damage_are_dead_letters(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "in"
    directory.mkdir()
    table = pa.table({"prompt": [f"row {number}" for number in range(100)]})
    path = directory / "a.parquet"
    pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"row 60")] ^= 0xFF
    path.write_bytes(content)
    counts = counted(model, directory, tmp_path)
    (by_type,) = counts.dead_letters.values()
    assert by_type == {"shard_corrupt": 50}
    assert counts.num_rows == 100


def test_row_groups_and_the_size_of_what_is_read_come_from_the_footer(model: Path, tmp_path: Path) -> None:
    directory = write_input(tmp_path / "in", [120])
    preparation = prepare(fake_job(model, directory, tmp_path / "out"))
    (shard,) = preparation.plan.shards
    groups = read_row_groups(locate(shard.uri), shard, ["prompt"])
    assert groups.starts == (0, 50, 100, 120)
    everything = read_row_groups(locate(shard.uri), shard, ["prompt", "id"])
    assert 0 < groups.bytes_per_row < everything.bytes_per_row


def test_a_long_way_into_a_row_group_is_not_gone(model: Path, tmp_path: Path) -> None:
    """A window at the end of a row group of 2,000 rows, and no leave to decode what lies before it."""
    directory = tmp_path / "in"
    directory.mkdir()
    pq.write_table(pa.table({"prompt": [str(number) for number in range(2000)]}), directory / "a.parquet")
    preparation = prepare(fake_job(model, directory, tmp_path / "out"))
    facts, (shard,) = preparation.facts, preparation.plan.shards
    surveyor = Surveyor(WorkerSetup(facts.spec, facts.model.directory, facts.max_model_len, facts.schema))
    window = WorkUnit(shard.shard_id, 1900, 16)
    near = surveyor.prompts(Task((window,), (shard,), 0.0))
    assert [prompt.row_id for prompt in near] == [f"{shard.shard_id}:{row}" for row in range(16)]
    far = surveyor.prompts(Task((window,), (shard,), 1e9))
    assert far[0].row_id == f"{shard.shard_id}:1900"
