"""Names that come with the input (files, columns, roles) stay inside the output and inside their line of the log."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs import command, job_values, model_without_weights, read_dead_letters, read_rows, write_job_file

pytestmark = pytest.mark.usefixtures("ray_session")

#: Names that a file system takes and a careless program does not.
SHARD_NAMES = [
    "a\n12:00:00 INFO every row is committed.parquet",
    "\x1b[2J\x1b]0;title\x07.parquet",
    "a...parquet",
    "$(touch evil);`touch evil`.parquet",
    "%2e%2e%2fx.parquet",
    "{0.__class__}{{ 7 * 7 }}%s.parquet",
    "x" * 240 + ".parquet",
    "\u202egnp.parquet",
    "part-0000000000000000-0-1.parquet",
    "-rf.parquet",
]
COLUMNS = ["id", "prompt", "../../evil", "\x1b[31m", "a\nb", "{{ x }}", "/etc/passwd"]
OUTPUT_NAMES = re.compile(r"[\w.-]{1,120}")


def test_hostile_names_of_shards_and_columns_leave_an_ordinary_output(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for index, name in enumerate(SHARD_NAMES):
        path = source / ("sub\x1b[1m" if index % 2 else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {column: [f"{index}-{row}" for row in range(3)] for column in COLUMNS}
        pq.write_table(pa.table({**rows, "id": [3 * index, 3 * index + 1, 3 * index + 2]}), path)
    (source / "\x1b[5mbroken.parquet").write_bytes(b"no parquet")
    before = {path for path in tmp_path.rglob("*") if output not in path.parents}
    values = job_values(
        model_without_weights(tmp_path / "model"), source, output, engine={"kind": "fake"}, prompt={"text": "prompt"}
    )
    job_file = write_job_file(tmp_path / "job.yaml", values)
    ended = [
        command("plan", job_file),
        command("run", job_file),
        command("status", output),
        command("verify", output),
        command("show", output),
    ]
    assert [each.exit_code for each in ended][1] in (0, 1, 3), ended[1].output
    assert len(read_rows(output)) == 3 * len(SHARD_NAMES)
    assert read_dead_letters(output) == []
    made = {path for path in tmp_path.rglob("*") if path != output and output not in path.parents}
    assert made - before <= {tmp_path / "model", job_file, *(tmp_path / "model").iterdir()}
    for path in output.rglob("*"):
        assert OUTPUT_NAMES.fullmatch(path.name), path
    for each in ended:
        assert "\x1b[2J" not in each.output
        assert "\x1b]0;" not in each.output
        assert "\x1b[5m" not in each.output
        assert not re.search(r"^12:00:00 INFO every row", each.output, re.MULTILINE), each.output


@pytest.mark.parametrize("name", ["sub/../../evil.parquet", "../evil.parquet"])
def test_a_path_upwards_names_a_file_and_no_place_in_the_output(tmp_path: Path, name: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    pq.write_table(pa.table({"id": [1], "prompt": ["Hi"]}), tmp_path / "evil.parquet")
    values = job_values(
        model_without_weights(tmp_path / "model"),
        f"{tmp_path}/in/{name}",
        tmp_path / "out",
        engine={"kind": "fake"},
    )
    ended = command("run", write_job_file(tmp_path / "job.yaml", values))
    assert ended.exit_code == 0, ended.output
    assert all(OUTPUT_NAMES.fullmatch(path.name) for path in (tmp_path / "out").rglob("*"))
    assert len(read_rows(tmp_path / "out")) == 1
