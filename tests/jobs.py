"""Builders of jobs and inputs that end-to-end and fault tests share."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from click.testing import CliRunner, Result

from batchinfer.cli import main
from batchinfer.job_file import parse_job
from batchinfer.spec import JobSpec
from tests.tiny import EXAONE3_TEMPLATE, write_tokenizer

#: Words to make prompts of; a few Korean ones, so that tokens and characters do not line up.
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "게으른",
    "개",
    "while",
    "counting",
    "stars",
    "from",
    "one",
    "to",
    "seven",
    "안녕하세요",
]


def prompts(num_rows: int, offset: int = 0) -> list[str]:
    """Distinct prompts of skewed lengths, the same ones for the same numbers."""
    return [
        f"{number}: " + " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(1 + (number * number) % 23))
        for number in range(offset, offset + num_rows)
    ]


def write_input(directory: Path, rows_per_shard: Sequence[int]) -> Path:
    """Shards ``part-<k>.parquet`` with columns ``id`` and ``prompt``; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    offset = 0
    for index, num_rows in enumerate(rows_per_shard):
        table = pa.table({"id": range(offset, offset + num_rows), "prompt": prompts(num_rows, offset)})
        pq.write_table(table, directory / f"part-{index}.parquet", row_group_size=50)
        offset += num_rows
    return directory


def model_without_weights(
    directory: Path, *, chat_template: str | None = EXAONE3_TEMPLATE, with_tokenizer: bool = True, limit: int = 512
) -> Path:
    """Configuration and tokenizer alone: all that the fake engine needs of a model."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "exaone", "max_position_embeddings": limit}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if with_tokenizer:
        write_tokenizer(directory, chat_template=chat_template)
    return directory


def job_values(
    model: Path | str, input_path: Path | str, output_path: Path | str, /, **blocks: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """The job file of :func:`job`; a block's key that is None leaves the key out."""
    values: dict[str, dict[str, object]] = {
        "model": {"path": str(model), "dtype": "float32"},
        "input": {"path": str(input_path)},
        "prompt": {"text": "prompt"},
        "sampling": {"max_new_tokens": 12},
        "output": {"path": str(output_path)},
        # One thread per replica: several tiny models side by side would only wait for each other's threads.
        "cluster": {"num_cpus": 1},
        "execution": {"rows_per_unit": 16},
    }
    for name, block in blocks.items():
        values[name] = {key: value for key, value in {**values.get(name, {}), **block}.items() if value is not None}
    return values


def job(
    model: Path | str, input_path: Path | str, output_path: Path | str, /, **blocks: Mapping[str, object]
) -> JobSpec:
    """A small float32 job over the column ``prompt``; ``blocks`` are merged into the job file's blocks."""
    return parse_job(job_values(model, input_path, output_path, **blocks))


def fake_job(
    model: Path | str, input_path: Path | str, output_path: Path | str, /, **blocks: Mapping[str, object]
) -> JobSpec:
    """:func:`job` on the fake engine."""
    return job(model, input_path, output_path, **{**blocks, "engine": {"kind": "fake", **blocks.get("engine", {})}})


def write_job_file(path: Path, values: Mapping[str, object]) -> Path:
    """A job file for the commands."""
    path.write_text(yaml.safe_dump(dict(values), allow_unicode=True), encoding="utf-8")
    return path


def command(*arguments: str | Path) -> Result:
    """``batchinfer ARGUMENTS`` in this process, with the logging it configures undone afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("batchinfer")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()
    try:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def read_rows(
    output: Path, columns: Sequence[str] = ("id", "sample", "completion", "finish_reason")
) -> list[tuple[object, ...]]:
    """The completions, read with pyarrow alone and sorted: what two runs are compared by."""
    table = pq.read_table(output / "completions").select(list(columns))
    return sorted(zip(*(table.column(name).to_pylist() for name in columns), strict=True))


def read_dead_letters(output: Path) -> list[tuple[str, str]]:
    """(row_id, error_type) of every dead letter, sorted."""
    if not (output / "errors").is_dir():
        return []
    table = pq.read_table(output / "errors")
    return sorted(zip(table.column("row_id").to_pylist(), table.column("error_type").to_pylist(), strict=True))
