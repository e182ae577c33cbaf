"""The Ray this run uses: joined or started here, and the machines it has."""

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray._private.ray_constants
import ray._private.state
import ray._private.utils
import ray.exceptions
import ray.util.client

from batchinfer.cluster.share import NodeSize
from batchinfer.errors import ClusterLost
from batchinfer.redact import redact
from batchinfer.spec import ClusterSpec

logger = logging.getLogger(__name__)

#: Near Ray's minimum: only unit descriptors and counts pass through its object store.
OBJECT_STORE_BYTES = 100 * 2**20
#: How long the cluster's head may take to answer, one that is just starting too. Ray itself tries for minutes.
CONNECT_TIMEOUT_S = 15.0


def await_head(cluster: ClusterSpec) -> None:
    """Return once something accepts connections where :func:`connected` is to join, or at once if none is to be joined.

    Raises:
        ClusterLost: nothing does so in :data:`CONNECT_TIMEOUT_S`.
    """
    address = cluster.address
    if address is None or ray.is_initialized():
        return
    logger.info("joining the Ray cluster at %s", redact(address))
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    until_s = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > until_s:
                raise _lost(cluster, f"nothing accepts connections there: {error}") from error
        time.sleep(0.5)


@contextlib.contextmanager
def connected(cluster: ClusterSpec) -> Iterator[None]:
    """A connection to Ray: the one this process has, else one of its own that ends with the block.

    For minutes Ray tries an address where nobody answers, and no signal breaks it off: call :func:`await_head` first.

    Raises:
        ClusterLost: no cluster answers at ``cluster.address``, or Ray cannot be started here.
    """
    if ray.is_initialized():
        yield
        return
    # Wanted are neither usage reports over the network nor a rewritten CUDA_VISIBLE_DEVICES on CPU actors.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts workers at nice 15: beside anything else on the machine the model would be what waits.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # When a connection breaks Ray waits so long for word of how the actor ended, then calls it unavailable. That of a
    # lost machine comes after its health checks (3 s each, 5 of them), and clears the units that the machine held.
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "30000")
    try:
        with _signals_left_to_the_run():
            _start_or_join(cluster)
        yield
    finally:
        # Also where the start has failed: half a connection would be taken for the user's own.
        ray.shutdown()


def _start_or_join(cluster: ClusterSpec) -> None:
    """Raises ClusterLost."""
    try:
        if cluster.address is None:
            logger.info("starting Ray inside this process")
            with _on_loopback():
                ray.init(
                    # Left out, it would mean RAY_ADDRESS or whatever `ray start` has left running on this machine.
                    address="local",
                    num_cpus=_cpus_to_offer(cluster),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        else:
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        raise _lost(cluster, str(error)) from error


def _lost(cluster: ClusterSpec, why: str) -> ClusterLost:
    return ClusterLost(
        f"cluster.address {redact(cluster.address or 'null (in this process)')}: Ray does not answer ({redact(why)}); "
        "check the address with `ray status`, and RAY_AUTH_TOKEN if the cluster asks for a token, then run again"
    )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have every port of a Ray that starts in the block listen on this machine alone.

    All its servers follow the node's address, for which Ray refuses loopback on Linux; on macOS and Windows it takes
    loopback by itself, and this constant says which of the two it is.
    """
    before = ray._private.ray_constants.ENABLE_RAY_CLUSTER
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _signals_left_to_the_run() -> Iterator[None]:
    """Leave SIGTERM to the run while Ray starts in the block, and after it.

    Ray has handlers of its own. Those in Python exit out of whatever line the signal meets; a Ray that is left
    half-way through its start leaves processes behind, for a minute in which nobody ends them. The one in C++ calls
    the handler that it has replaced and aborts the process 3 s later, in the middle of its drain
    (https://github.com/ray-project/ray/pull/64830).
    """
    constants, utils = ray._private.ray_constants, ray._private.utils
    before = utils.set_sigterm_handler, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    utils.set_sigterm_handler = lambda handler: None
    constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        utils.set_sigterm_handler, constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = before


def _cpus_to_offer(cluster: ClusterSpec) -> int:
    """The machine's cores, or more where the job file asks for more replicas than there are cores."""
    asked = cluster.replicas if isinstance(cluster.replicas, int) else 1
    return max(os.cpu_count() or 1, math.ceil(asked * (cluster.num_cpus or 0)))


def cluster_nodes() -> list[NodeSize]:
    """The machines of the cluster as they are now, those about to go left out."""
    going = nodes_about_to_go()
    return [
        NodeSize(node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0))
        for node in _nodes()
        if node["Alive"] and node["NodeID"] not in going
    ]


def nodes_about_to_go() -> frozenset[str]:
    """Ids of machines that are being drained: a spot machine's notice, a scale-down, ``ray drain-node``.

    Empty behind ray://, where Ray does not tell.
    """
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return frozenset()
    return frozenset(ray._private.state.state.get_draining_nodes())


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def head_address() -> str | None:
    """``host:port`` of the cluster's head; None behind ray://, where only the client's server can be reached."""
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address
