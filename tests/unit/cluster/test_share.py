"""What a replica gets of a cluster: always something that one node can give, or the share says that none can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.share import NodeSize, ReplicaShare, replica_share
from batchinfer.spec import ClusterSpec

CPU_2 = NodeSize(0.0, 2.0)
GPU_8 = NodeSize(8.0, 64.0)


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        ({}, [CPU_2], ReplicaShare(0.0, 2.0, 1, 1)),
        ({}, [CPU_2, CPU_2], ReplicaShare(0.0, 2.0, 1, 2)),
        ({}, [NodeSize(0.0, 16.0), GPU_8, GPU_8], ReplicaShare(1.0, 1.0, 16, 16)),
        ({"num_gpus": 2}, [NodeSize(3.0, 8.0), NodeSize(3.0, 8.0)], ReplicaShare(2.0, 1.0, 2, 2)),
        ({"num_gpus": 0.5}, [NodeSize(1.0, 8.0)], ReplicaShare(0.5, 1.0, 2, 2)),
        ({"replicas": 3}, [CPU_2], ReplicaShare(0.0, 0.5, 3, 4)),
        ({"replicas": 2}, [NodeSize(0.0, 4.0), CPU_2], ReplicaShare(0.0, 2.0, 2, 3)),
        ({"replicas": 3, "num_cpus": 1}, [CPU_2], ReplicaShare(0.0, 1.0, 3, 2)),
        ({"num_gpus": 1}, [CPU_2], ReplicaShare(1.0, 1.0, 1, 0)),
        ({}, [], ReplicaShare(0.0, 1.0, 1, 0)),
    ],
    ids=[
        "a machine without GPUs is one replica's",
        "a replica does not span nodes",
        "one replica per GPU",
        "GPUs of one node each",
        "two replicas on one GPU",
        "parts of a core",
        "nodes of two sizes",
        "more than fit, as asked",
        "no GPU anywhere",
        "no node yet",
    ],
)
def test_the_share_is_what_nodes_can_give(
    asked: dict[str, float], nodes: list[NodeSize], expected: ReplicaShare
) -> None:
    assert replica_share(ClusterSpec.model_validate(asked), nodes) == expected


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(1, 90))
def test_as_many_replicas_as_asked_fit_the_cores_there_are(cores: list[int], num_replicas: int) -> None:
    nodes = [NodeSize(0.0, float(count)) for count in cores]
    share = replica_share(ClusterSpec(replicas=num_replicas), nodes)
    assert share.num_fitting >= num_replicas
    assert 0 < share.num_cpus <= max(cores)
