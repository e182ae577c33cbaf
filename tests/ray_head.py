"""The head of a Ray cluster with its dashboard, on loopback: ``with ray_head(token) as url``."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

START_TIMEOUT_S = 120.0


def environment(token: str) -> dict[str, str]:
    """For the head and for who talks to it; ``python`` is this one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return {**clean, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@contextmanager
def ray_head(token: str, num_cpus: int = 2) -> Iterator[str]:
    """The URL of the dashboard of a head that asks for ``token``; everything is gone after the block."""
    port, dashboard, agent, client = _free_ports(4)
    with tempfile.TemporaryDirectory(prefix="bi-", ignore_cleanup_errors=True) as directory:
        log = Path(directory) / "printed"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-gpus=0"),
                    *(f"--num-cpus={num_cpus}", f"--port={port}", "--node-ip-address=127.0.0.1"),
                    *(f"--temp-dir={directory}", f"--ray-client-server-port={client}"),
                    *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                    *(f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000"),
                ],
                env=environment(token),
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        try:
            until_s = time.monotonic() + START_TIMEOUT_S
            # The agent takes submissions; it is the last to listen.
            while not (_accepts(dashboard) and _accepts(agent)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until_s, f"the head did not start: {log.read_text()}"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            _, left = psutil.wait_procs(below, timeout=10)
            for each in left:
                each.kill()
            process.kill()
            process.wait(10)


def _free_ports(count: int) -> list[int]:
    """Beyond the range that Ray takes its workers' ports from, which it checks the others against."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports between 20000 and 32000")


def _accepts(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0
