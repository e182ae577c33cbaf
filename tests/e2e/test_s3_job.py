"""Whole jobs with input, model and output on a real S3 server, and where their credentials do not go."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs
from click.testing import Result

import batchinfer
from tests.jobs import command, job, job_values, model_without_weights, read_rows, write_input, write_job_file
from tests.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, seaweed_or_skip

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS = 35
WRONG_SECRET = "not-the-right-secret-key"
#: Where the job files of these tests take the secret from.
SECRET_VARIABLE = "BATCHINFER_TEST_S3_SECRET"
CREDENTIALS = (ACCESS_KEY, SECRET_KEY, WRONG_SECRET)


server = pytest.fixture(scope="module")(seaweed_or_skip)


@dataclass(frozen=True, slots=True)
class Remote:
    """An empty prefix of the bucket, opened past the caches of the code under test."""

    server: S3Server
    prefix: str

    @property
    def files(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(**self.server.storage_options, skip_instance_cache=True)

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{self.prefix}/{name}"

    def upload(self, directory: Path, name: str) -> str:
        for path in directory.rglob("*"):
            if path.is_file():
                self.files.put_file(str(path), f"{self.uri(name)}/{path.relative_to(directory)}")
        return self.uri(name)

    def read(self, name: str) -> dict[str, bytes]:
        """Every object below ``name``."""
        files = self.files
        return {path: files.cat_file(path) for path in files.find(self.uri(name))}

    def completions(self, name: str) -> list[tuple[object, ...]]:
        """The rows of an output, as :func:`tests.jobs.read_rows` gives them, read with pyarrow and s3fs alone."""
        table = pq.read_table(f"{BUCKET}/{self.prefix}/{name}/completions", filesystem=self.files)
        columns = ("id", "sample", "completion", "finish_reason")
        return sorted(zip(*(table.column(column).to_pylist() for column in columns), strict=True))


@pytest.fixture
def remote(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Remote:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET_KEY)
    return Remote(server, uuid.uuid4().hex)


def remote_values(remote: Remote, model: Path, source: Path, /, **blocks: Mapping[str, object]) -> dict[str, Any]:
    """A job file with all three places on the server and the secret taken from the environment."""
    options = remote.server.with_secret(f"${{{SECRET_VARIABLE}}}")
    given = {name: {**blocks.get(name, {}), "storage_options": options} for name in ("model", "input", "output")}
    return job_values(
        remote.upload(model, "model"), remote.upload(source, "in"), remote.uri("out"), **{**blocks, **given}
    )


def on_output(remote: Remote, name: str, *options: str) -> Result:
    storage_options = json.dumps(remote.server.storage_options)
    return command(name, remote.uri("out"), "--storage-options", storage_options, *options)


def ray_log_files() -> Iterator[Path]:
    """What Ray's processes and our replicas in them have logged so far."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    yield from (path for path in (session / "logs").rglob("*") if path.is_file())


def leaks(remote: Remote, *printed: Result) -> list[str]:
    """Where a credential stands in the output, in Ray's logs or in what commands printed."""
    found = [
        f"{path}: {credential}"
        for path, content in remote.read("out").items()
        for credential in CREDENTIALS
        if credential.encode() in content
    ]
    # Row groups are compressed; the footer's texts are not, but the schema is encoded.
    for path in remote.files.glob(f"{remote.uri('out')}/*/*.parquet"):
        with remote.files.open(path) as part:
            table = pq.read_table(part)
        text = f"{table.schema.metadata} {table.to_pylist()}"
        found += [f"{path}: {credential}" for credential in CREDENTIALS if credential in text]
    found += [
        f"{path}: {credential}"
        for path in ray_log_files()
        for credential in CREDENTIALS
        if credential.encode() in path.read_bytes()
    ]
    return found + [
        f"printed: {credential}" for result in printed for credential in CREDENTIALS if credential in result.output
    ]


def test_a_job_on_object_storage_from_its_plan_to_its_proof_and_resumed(remote: Remote, tmp_path: Path) -> None:
    """1. plan  2. run  3. status, verify  4. a part is deleted  5. verify tells  6. run makes that part alone again."""
    values = remote_values(
        remote,
        model_without_weights(tmp_path / "model"),
        write_input(tmp_path / "in", [20, 15]),
        engine={"kind": "fake"},
        sampling={"n": 2, "temperature": 1.0},
        execution={"rows_per_unit": 10},
    )
    job_file = write_job_file(tmp_path / "job.yaml", values)
    plan = command("plan", job_file, "--json")
    assert json.loads(plan.stdout)["num_rows_pending"] == NUM_ROWS, plan.output
    assert remote.read("out") == {}

    run = command("run", job_file)
    assert run.exit_code == 0, run.output
    status = on_output(remote, "status", "--json")
    found = json.loads(status.stdout)
    assert (found["state"], found["num_rows_committed"], found["holder"]) == ("complete", NUM_ROWS, None)
    assert found["last_run"]["num_units_committed"] == 4
    verify = on_output(remote, "verify", "--json")
    assert (verify.exit_code, json.loads(verify.stdout)["verdict"]) == (0, "complete")
    assert on_output(remote, "show").exit_code == 0
    expected = remote.completions("out")
    assert [row[0] for row in expected] == [number // 2 for number in range(2 * NUM_ROWS)]

    parts = remote.files.glob(f"{remote.uri('out')}/completions/*.parquet")
    assert len(parts) == 4
    remote.files.rm_file(parts[1])
    damaged = on_output(remote, "verify")
    assert damaged.exit_code == 3
    again = command("run", job_file, "--json")
    resumed = json.loads(again.stdout)
    assert (resumed["outcome"], resumed["num_units"], resumed["num_rows_committed"]) == ("complete", 4, NUM_ROWS)
    assert 0 < resumed["num_completions"] <= 2 * 10
    assert remote.completions("out") == expected
    assert on_output(remote, "verify").exit_code == 0
    assert any("/_job/runs/" in path for path in remote.read("out"))
    assert leaks(remote, plan, run, status, verify, damaged, again) == []


@pytest.mark.slow
def test_a_real_model_answers_from_object_storage_as_from_disk(remote: Remote, exaone: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", [20, 15])
    run = command("run", write_job_file(tmp_path / "job.yaml", remote_values(remote, exaone, source)), "--json")
    assert run.exit_code == 0, run.output
    assert on_output(remote, "verify").exit_code == 0
    batchinfer.run(job(exaone, source, tmp_path / "out"))
    assert remote.completions("out") == read_rows(tmp_path / "out")
    assert leaks(remote, run) == []


@pytest.mark.parametrize("place", ["input", "model", "output"])
def test_a_wrong_secret_ends_the_run_with_the_place_and_the_way_out(remote: Remote, tmp_path: Path, place: str) -> None:
    values = remote_values(
        remote, model_without_weights(tmp_path / "model"), write_input(tmp_path / "in", [5]), engine={"kind": "fake"}
    )
    values[place]["storage_options"] = remote.server.with_secret(WRONG_SECRET)
    run = command("run", write_job_file(tmp_path / "job.yaml", values), "--json")
    assert run.exit_code == 2, run.output
    error = json.loads(run.stdout)["error"]
    assert "access refused" in error
    assert "storage_options" in error
    assert {"input": "/in", "model": "/model", "output": "/out"}[place] in error
    assert remote.read("out") == {}
    assert leaks(remote, run) == []


@pytest.mark.parametrize("name", ["status", "verify", "show"])
def test_a_wrong_secret_is_refused_by_the_commands_that_only_read(remote: Remote, name: str) -> None:
    options = json.dumps(remote.server.with_secret(WRONG_SECRET))
    ended = command(name, remote.uri("out"), "--storage-options", options)
    assert ended.exit_code == 2, ended.output
    assert "access refused" in ended.output
    assert "--storage-options" in ended.output or "storage_options" in ended.output
    assert leaks(remote, ended) == []


def test_the_secret_of_these_tests_is_found_where_it_does_stand(remote: Remote) -> None:
    """The search above is no test if it cannot find anything."""
    remote.files.pipe_file(f"{remote.uri('out')}/x.txt", os.environ[SECRET_VARIABLE].encode())
    assert len(leaks(remote)) == 1
