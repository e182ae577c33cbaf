"""How a cluster is divided among replicas: arithmetic over what its nodes have, no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer.spec import ClusterSpec


@dataclass(frozen=True, slots=True)
class NodeSize:
    """What one machine of the cluster has in total, in use or not."""

    num_gpus: float
    num_cpus: float


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one replica is given, and how many there are to be.

    ``num_fitting`` replicas of that share fit the nodes as they are; 0 = none can start until the cluster changes.
    """

    num_gpus: float
    num_cpus: float
    num_replicas: int
    num_fitting: int


def replica_share(cluster: ClusterSpec, nodes: Sequence[NodeSize]) -> ReplicaShare:
    """One replica per GPU, or one on a cluster without, or as the job file says; a replica never spans nodes."""
    has_gpus = any(node.num_gpus for node in nodes)
    num_gpus = cluster.num_gpus if cluster.num_gpus is not None else (1.0 if has_gpus else 0.0)
    num_asked = None if cluster.replicas == "auto" else cluster.replicas
    if cluster.num_cpus is not None:
        num_cpus = cluster.num_cpus
    else:
        num_cpus = 1.0 if num_gpus else _cpus_each(nodes, num_asked or 1)
    num_fitting = sum(_num_fitting(node, num_gpus, num_cpus) for node in nodes)
    # One is asked for even where none fits: the request is what makes an autoscaler add the node for it.
    num_replicas = num_asked or (max(1, num_fitting) if num_gpus else 1)
    return ReplicaShare(num_gpus, num_cpus, num_replicas, num_fitting)


def _num_fitting(node: NodeSize, num_gpus: float, num_cpus: float) -> int:
    # In Ray's own unit, a ten-thousandth: 1.0 // 0.2 is 4 in floating point.
    pairs = ((node.num_gpus, num_gpus), (node.num_cpus, num_cpus))
    return min((round(has * 10_000) // round(takes * 10_000) for has, takes in pairs if takes), default=1)


def _cpus_each(nodes: Sequence[NodeSize], num_replicas: int) -> float:
    """As many whole cores as ``num_replicas`` can each get on one node, else the same part of a core."""
    cores = [int(node.num_cpus) for node in nodes]
    for share in range(max(cores, default=0), 0, -1):
        if sum(count // share for count in cores) >= num_replicas:
            return float(share)
    num_cores = sum(cores)
    if not num_cores:
        return 1.0
    replicas_per_core = -(-num_replicas // num_cores)
    # Rounded down to a hundredth, so that all of them fit.
    return (100 // replicas_per_core) / 100
