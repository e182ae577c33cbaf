"""A cluster that is not there is named soon, one that is just starting is waited for, and signals stay the run's."""

import signal
import socket
import sys
import threading
import time

import pytest
import ray._private.ray_constants
import ray._private.utils

from batchinfer.cluster import ray_cluster
from batchinfer.cluster.ray_cluster import await_head, connected
from batchinfer.errors import ClusterLost
from batchinfer.spec import ClusterSpec


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have started is not to be taken for the run's own."""
    monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_named_soon(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.3)
    address = f"{scheme}127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    with pytest.raises(ClusterLost, match=f"cluster.address {address}: Ray does not answer .*ray status"):
        await_head(ClusterSpec(address=address))
    assert time.monotonic() - began_s < 10.0


@pytest.mark.usefixtures("no_session")
def test_the_address_behind_auto_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ClusterLost, match=r"cluster\.address auto"):
        await_head(ClusterSpec(address="auto"))
    monkeypatch.delenv("RAY_ADDRESS")
    await_head(ClusterSpec(address="auto"))


@pytest.mark.usefixtures("no_session")
def test_a_head_that_is_just_starting_is_waited_for() -> None:
    port = free_port()
    servers: list[socket.socket] = []
    timer = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    timer.start()
    await_head(ClusterSpec(address=f"127.0.0.1:{port}"))
    timer.join()
    servers[0].close()


def test_nothing_is_awaited_where_nothing_is_to_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.socket, "create_connection", lambda *arguments, **options: pytest.fail("tried"))
    for is_initialized, address in [(False, None), (True, "127.0.0.1:1")]:
        monkeypatch.setattr(ray_cluster.ray, "is_initialized", lambda so=is_initialized: so)
        await_head(ClusterSpec(address=address))


@pytest.mark.usefixtures("no_session")
def test_ray_does_not_take_the_handler_of_sigterm_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's would exit out of its half-done start, and leave processes behind."""
    before, seen = signal.getsignal(signal.SIGTERM), []
    constants = ray._private.ray_constants

    def init(**options: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        seen.extend([signal.getsignal(signal.SIGTERM), constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER])
        raise ConnectionError("the start fails")

    ours = ray._private.utils.set_sigterm_handler
    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with pytest.raises(ClusterLost, match="the start fails"), connected(ClusterSpec()):
        pytest.fail("connected")
    assert seen == [before, True]
    assert not constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    assert ray._private.utils.set_sigterm_handler is ours
