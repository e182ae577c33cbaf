"""The Ray this run uses: joined or started here, and the machines it has."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
import ray.util.client

from batchinfer.cluster.share import NodeSize
from batchinfer.errors import ClusterLost
from batchinfer.spec import ClusterSpec

logger = logging.getLogger(__name__)

#: Near Ray's minimum: only unit descriptors and counts pass through its object store.
OBJECT_STORE_BYTES = 100 * 2**20


@contextlib.contextmanager
def connected(cluster: ClusterSpec) -> Iterator[None]:
    """A connection to Ray: the one this process has, else one of its own that ends with the block.

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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if cluster.address is None:
            logger.info("starting Ray inside this process")
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
            logger.info("joining the Ray cluster at %s", cluster.address)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterLost(
            f"cluster.address {cluster.address or 'null (in this process)'}: Ray does not answer ({error}); "
            "check the address with `ray status`, and RAY_AUTH_TOKEN if the cluster asks for a token, then run again"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has put its own handler there, which ends the process before it can say how to go on.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _cpus_to_offer(cluster: ClusterSpec) -> int:
    """The machine's cores, or more where the job file asks for more replicas than there are cores."""
    asked = cluster.replicas if isinstance(cluster.replicas, int) else 1
    return max(os.cpu_count() or 1, math.ceil(asked * (cluster.num_cpus or 0)))


def cluster_nodes() -> list[NodeSize]:
    """The machines of the cluster as they are now."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        NodeSize(node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0))
        for node in nodes
        if node["Alive"]
    ]


def head_address() -> str | None:
    """``host:port`` of the cluster's head; None behind ray://, where only the client's server can be reached."""
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return None
    address: str = ray.get_runtime_context().gcs_address
    return address
