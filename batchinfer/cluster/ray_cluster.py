"""The Ray this run uses: joined or started here, its size, and what one replica gets of it."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import ray

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
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise ClusterLost(
            f"cluster.address {cluster.address or 'null (in this process)'}: Ray does not answer ({error}); "
            "check the address with `ray status`, then run again"
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


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one replica is given of the cluster, and how many there are to be."""

    num_gpus: float
    num_cpus: float
    num_replicas: int


def replica_share(cluster: ClusterSpec) -> ReplicaShare:
    """Divide the cluster as it is now: one replica per GPU, or one on a cluster without, or as the job file says."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    total_gpus, total_cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
    num_gpus = cluster.num_gpus if cluster.num_gpus is not None else (1.0 if total_gpus else 0.0)
    fitting = int(total_gpus // num_gpus) if num_gpus else 1
    num_replicas = fitting if cluster.replicas == "auto" else cluster.replicas
    if cluster.num_cpus is not None:
        num_cpus = cluster.num_cpus
    elif num_gpus:
        num_cpus = 1.0
    else:
        share = total_cpus / max(1, num_replicas)
        # Ray takes fractions below one core and whole numbers above.
        num_cpus = float(math.floor(share)) if share >= 1 else math.floor(share * 100) / 100
    return ReplicaShare(num_gpus, num_cpus, num_replicas)
