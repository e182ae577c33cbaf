"""Credentials go where they are needed and nowhere else: no file, no log, no error, no list of processes has them."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.ray_cluster import await_head
from batchinfer.errors import ClusterLost
from batchinfer.spec import ClusterSpec
from tests.jobs import command, job_values, model_without_weights, write_input, write_job_file

#: One for every way in which a job or its environment can hold a secret; each is found by its last word.
PASSWORD, QUERY_TOKEN = "sesame-password", "sesame-query"
OPTION, KEY, HUB_TOKEN, CLUSTER_TOKEN = (
    "sesame-option",
    "sesame-key",
    "hf_sesamehub",
    "sesame-cluster-token-0123456789",
)
SECRETS = (PASSWORD, QUERY_TOKEN, OPTION, KEY, HUB_TOKEN, CLUSTER_TOKEN)
NUM_ROWS = 40
TIMEOUT_S = 120.0


class FileServer(ThreadingHTTPServer):
    """Files of a directory over HTTP, to who brings password, token and key; answers in ranges, as Parquet is read."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.root = root
        self.status = 200

    def uri(self, name: str) -> str:
        port = self.server_address[1]
        return f"http://user:{PASSWORD}@127.0.0.1:{port}/{name}?token={QUERY_TOKEN}"


class _Files(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        basic = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        keys = (self.headers["Authorization"], self.headers["X-Key"])
        allowed = keys == (basic, KEY) and f"token={QUERY_TOKEN}" in self.path
        if self.server.status != 200 or not allowed or not path.is_file():
            self.send_error(self.server.status if self.server.status != 200 else 403 if not allowed else 404)
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Nothing: what this server is asked is full of secrets."""


def command_lines(pid: int) -> set[str]:
    """Of a process and all below it."""
    lines = set()
    with suppress(psutil.Error):  # one may end meanwhile
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            lines.add(" ".join(process.cmdline()))
    return lines


@dataclass
class Watched:
    """One command as a process of its own: what it printed, and every command line seen below it."""

    exit_code: int
    printed: str
    command_lines: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Place:
    """A job with a secret in every place that takes one, and where its Ray writes."""

    server: FileServer
    job_file: Path
    output: Path
    ray: Path

    def batchinfer(self, *arguments: str | Path) -> Watched:
        printed = self.output.parent / "printed"
        with printed.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "batchinfer", *map(str, arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_TMPDIR": str(self.ray)},
            )
            watched = Watched(-1, "")
            until_s = time.monotonic() + TIMEOUT_S
            try:
                while process.poll() is None and time.monotonic() < until_s:
                    watched.command_lines |= command_lines(process.pid)
                    time.sleep(0.05)
            finally:
                process.kill()
            watched.exit_code = process.wait(10)
        watched.printed = printed.read_text()
        return watched

    def leaks(self, *watched: Watched) -> list[str]:
        found = [
            f"{path}: {secret}"
            for place in (self.output, self.ray)
            for path in place.rglob("*")
            if path.is_file()
            for secret in SECRETS
            if secret.encode() in path.read_bytes()
        ]
        for path in self.output.rglob("*.parquet"):
            table = pq.read_table(path)
            text = f"{table.schema.metadata} {table.to_pylist()}"  # the pages are compressed
            found += [f"{path}: {secret}" for secret in SECRETS if secret in text]
        for each in watched:
            seen = "\n".join([each.printed, *each.command_lines])
            found += [f"printed or listed: {secret}" for secret in SECRETS if secret in seen]
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    write_input(tmp_path / "in", [NUM_ROWS])
    values = job_values(
        model_without_weights(tmp_path / "model"),
        "${SESAME_INPUT}",
        tmp_path / "out",
        model={"storage_options": {"secret": "${SESAME_OPTION}"}},
        input={"storage_options": {"client_kwargs": {"headers": {"X-Key": "${SESAME_KEY}"}}}},
        output={"storage_options": {"password": "${SESAME_OPTION}"}},
        engine={"kind": "fake"},
    )
    # Ray's sockets need a short path.
    ray = Path(tempfile.mkdtemp(prefix="bi-"))
    server = FileServer(tmp_path / "in")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in (
        ("SESAME_OPTION", OPTION),
        ("SESAME_KEY", KEY),
        ("SESAME_INPUT", server.uri("part-0.parquet")),
        ("HF_TOKEN", HUB_TOKEN),
        ("RAY_AUTH_TOKEN", CLUSTER_TOKEN),
    ):
        monkeypatch.setenv(name, value)
    try:
        yield Place(server, write_job_file(tmp_path / "job.yaml", values), tmp_path / "out", ray)
    finally:
        server.shutdown()
        server.server_close()
        shutil.rmtree(ray, ignore_errors=True)


def test_a_whole_job_leaves_no_credential_anywhere(place: Place) -> None:
    """1. plan  2. run, with its Ray and its replica  3. status, verify."""
    plan = command("plan", place.job_file)
    assert plan.exit_code == 0, plan.output
    run = place.batchinfer("run", place.job_file)
    assert run.exit_code == 0, run.printed
    assert any("ray::" in line for line in run.command_lines), run.command_lines
    assert any(path.suffix in (".log", ".out", ".err") for path in place.ray.rglob("*"))
    others = [plan, command("status", place.output), command("verify", place.output)]
    assert [other.exit_code for other in others] == [0, 0, 0]
    assert place.leaks(run, *(Watched(other.exit_code, other.output) for other in others)) == []
    job = json.loads((place.output / "_job" / "job.json").read_text())
    assert "***" in json.dumps(job["spec"]["input"])


@pytest.mark.parametrize("status", [401, 404, pytest.param(503, marks=pytest.mark.slow)])
def test_errors_of_the_storage_name_the_place_without_its_credentials(place: Place, status: int) -> None:
    place.server.status = status
    plan = command("plan", place.job_file)
    assert plan.exit_code in (2, 3), plan.output
    assert "127.0.0.1" in plan.output
    assert place.leaks(Watched(plan.exit_code, plan.output)) == []


@pytest.mark.parametrize(
    "change",
    [
        ["input.storage_options=${SESAME_OPTION}"],
        ["output.path=${SESAME_OPTION}/${NO_SUCH_VARIABLE}"],
        ["input.path=nosuch://user:${SESAME_OPTION}@host/x?token=${SESAME_KEY}"],
        ["input.storage_options={endpoint_urll: '${SESAME_OPTION}'}"],
        ["model.path=s3://user:${SESAME_OPTION}@bucket/m?sig=${SESAME_KEY}", "model.revision=x"],
        ["sampling.seed=${SESAME_OPTION}"],
    ],
)
def test_errors_of_the_job_file_do_not_quote_what_the_environment_put_into_it(place: Place, change: list[str]) -> None:
    plan = command("plan", place.job_file, *(argument for value in change for argument in ("--set", value)))
    assert plan.exit_code in (2, 3), plan.output
    assert place.leaks(Watched(plan.exit_code, plan.output)) == [], plan.output


def test_a_cluster_that_does_not_answer_is_named_without_credentials(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("batchinfer.cluster.ray_cluster.CONNECT_TIMEOUT_S", 0.0)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    caplog.set_level("INFO")
    with pytest.raises(ClusterLost) as lost:
        await_head(ClusterSpec(address=f"ray://user:{PASSWORD}@127.0.0.1:1"))
    assert "ray://***@127.0.0.1:1" in str(lost.value)
    assert PASSWORD not in str(lost.value) + caplog.text


def test_the_secrets_of_these_tests_are_found_where_they_do_stand(place: Place) -> None:
    """The search above is no test if it cannot find anything."""
    place.output.mkdir()
    (place.output / "x.txt").write_text(OPTION)
    (place.ray / "x.log").write_text(HUB_TOKEN)
    assert len(place.leaks(Watched(0, PASSWORD, {f"python --token {CLUSTER_TOKEN}"}))) == 4
