"""When each ready replica is asked how it goes, when its counters are recorded, and which machine it is on. Pure."""

import heapq
from dataclasses import dataclass, field

#: How often a replica is asked for its progress, and all of them together at most in a second.
PROGRESS_INTERVAL_S = 1.0
MAX_PROGRESS_PER_S = 100.0
#: The same for the events of their counters.
STATS_INTERVAL_S = 30.0
MAX_STATS_PER_S = 3.0


@dataclass(slots=True)
class ReplicaWatch:
    """The ready replicas. One question is under way to each at most: it is asked again after it has answered."""

    _nodes: dict[int, str] = field(default_factory=dict)
    _stats_at_s: dict[int, float] = field(default_factory=dict)
    _evicted: set[int] = field(default_factory=set)
    #: (due, replica); those of replicas that are gone are passed over.
    _questions: list[tuple[float, int]] = field(default_factory=list)

    def ready(self, replica_id: int, node_id: str, at_s: float) -> None:
        """Watch a replica from now on."""
        self._nodes[replica_id] = node_id
        self._stats_at_s[replica_id] = at_s
        heapq.heappush(self._questions, (at_s, replica_id))

    def gone(self, replica_id: int) -> None:
        """Watch it no more; nothing happens if it is not watched."""
        self._nodes.pop(replica_id, None)
        self._stats_at_s.pop(replica_id, None)
        self._evicted.discard(replica_id)

    def replicas(self) -> tuple[int, ...]:
        return tuple(self._nodes)

    def due(self, at_s: float) -> list[int]:
        """The replicas to ask now."""
        found = []
        while self._questions and self._questions[0][0] <= at_s:
            replica_id = heapq.heappop(self._questions)[1]
            if replica_id in self._nodes:
                found.append(replica_id)
        return found

    def answered(self, replica_id: int, at_s: float) -> bool:
        """It is to be asked again later; True when its counters are to be recorded now."""
        every_s = max(PROGRESS_INTERVAL_S, len(self._nodes) / MAX_PROGRESS_PER_S)
        heapq.heappush(self._questions, (at_s + every_s, replica_id))
        if at_s - self._stats_at_s[replica_id] < max(STATS_INTERVAL_S, len(self._nodes) / MAX_STATS_PER_S):
            return False
        self._stats_at_s[replica_id] = at_s
        return True

    def evict(self, going: frozenset[str]) -> list[int]:
        """The replicas on machines that are about to go, each of them once."""
        if not going:
            return []
        found = [it for it, node in self._nodes.items() if node in going and it not in self._evicted]
        self._evicted.update(found)
        return found

    def is_evicted(self, replica_id: int) -> bool:
        return replica_id in self._evicted
