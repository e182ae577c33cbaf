"""Joining a cluster that is not there fails soon; one that is just starting is waited for."""

import socket
import threading
import time

import pytest

from batchinfer.cluster import ray_cluster
from batchinfer.cluster.ray_cluster import connected
from batchinfer.errors import ClusterLost
from batchinfer.spec import ClusterSpec


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_named_soon(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    # It would be that of the tests' own Ray, which is only hidden here.
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: pytest.fail("Ray would try for minutes"))
    address = f"{scheme}127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    with pytest.raises(ClusterLost, match=f"cluster.address {address}: Ray does not answer .*ray status"):  # noqa: SIM117
        with connected(ClusterSpec(address=address)):
            pytest.fail("connected")
    assert time.monotonic() - began_s < 10.0


def test_the_address_behind_auto_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionError):
        ray_cluster._await_head("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    ray_cluster._await_head("auto")


def test_a_head_that_is_just_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    servers: list[socket.socket] = []
    timer = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    timer.start()
    ray_cluster._await_head(f"127.0.0.1:{port}")
    timer.join()
    servers[0].close()
