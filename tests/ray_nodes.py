"""A Ray cluster of several real raylets on this machine, in a process of its own: ``with ray_nodes() as nodes``.

Run as a script it is that process: it obeys one command a line, and answers each with one line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: A node that is gone is noticed within two seconds instead of fifteen.
FAST_CHECKS = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
#: For the cluster's processes and drivers that join it: every port on loopback, as is Ray's way on macOS.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class RayNodes:
    """The cluster seen from a test. Nodes are named by Ray's ids."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.address = str(self._ask("start"))

    def add(self, num_gpus: int = 1) -> str:
        """Start another node with so many GPUs that it says it has."""
        return str(self._ask(f"add {num_gpus}"))

    def give_notice(self, node_id: str) -> None:
        """Tell Ray that the node will be preempted in an hour, as a cloud's notice does through the autoscaler."""
        self._ask(f"notice {node_id}")

    def kill(self, node_id: str) -> None:
        """SIGKILL everything the node runs, as when the machine goes."""
        self._ask(f"kill {node_id}")

    def kill_head(self) -> None:
        self._ask("kill-head")

    def _ask(self, command: str) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{command}: the cluster's process ended")


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A cluster with a head that holds no replica, and no other node yet; everything is gone after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **FAST_CHECKS, **ON_LOOPBACK},
        start_new_session=True,
    )
    with process:
        try:
            yield RayNodes(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            finally:
                process.kill()


def _obey() -> None:
    import psutil
    import ray
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    store = {"object_store_memory": 80 * 2**20}
    cluster = Cluster()  # type: ignore[no-untyped-call]
    nodes: dict[str, Any] = {}

    def kill(node: Any) -> None:
        parents = [each.process for kind in node.all_processes.values() for each in kind]
        children = [child for each in parents for child in psutil.Process(each.pid).children(recursive=True)]
        # The raylet first: one that outlives its workers by a moment tells of their deaths, not of the machine's.
        for each in [*parents, *children]:
            each.send_signal(signal.SIGKILL)

    for line in sys.stdin:
        answer: object = None
        match line.split():
            case ["start"]:
                cluster.add_node(num_cpus=0, include_dashboard=False, **store)
                answer = cluster.address
            case ["add", num_gpus]:
                node = cluster.add_node(num_cpus=2, num_gpus=int(num_gpus), **store)
                nodes[node.node_id] = node
                answer = node.node_id
            case ["notice", node_id]:
                accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
                    node_id, autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "test", 2**41
                )
                assert accepted, why
            case ["kill", node_id]:
                kill(nodes[node_id])
            case ["kill-head"]:
                kill(cluster.head_node)
        print("answer", json.dumps(answer), flush=True)
    for node in [*nodes.values(), cluster.head_node]:
        kill(node)


if __name__ == "__main__":
    _obey()
