"""Until when each replica must have been heard of. Pure."""

import math

from batchinfer.cluster.queue_messages import ReplicaId


class Deadlines:
    """One deadline per replica, moved forward often and passed rarely, so that moving one costs nothing."""

    def __init__(self) -> None:
        self._due_s: dict[ReplicaId, float] = {}
        # No deadline is earlier. Deadlines that moved on leave it behind, and the next look brings it up again.
        self._not_before_s = math.inf

    @property
    def next_s(self) -> float:
        """When to look again at the latest; never too late, at times too early. Infinite without deadlines."""
        return self._not_before_s

    def __contains__(self, replica_id: ReplicaId) -> bool:
        return replica_id in self._due_s

    def move(self, replica_id: ReplicaId, due_s: float) -> None:
        """Set the replica's deadline, or move the one it has."""
        self._due_s[replica_id] = due_s
        self._not_before_s = min(self._not_before_s, due_s)

    def clear(self, replica_id: ReplicaId) -> None:
        self._due_s.pop(replica_id, None)

    def passed(self, at_s: float) -> list[ReplicaId]:
        """Replicas whose deadline is over; each is named once."""
        if at_s < self._not_before_s:
            return []
        late = [replica_id for replica_id, due_s in self._due_s.items() if due_s <= at_s]
        for replica_id in late:
            del self._due_s[replica_id]
        self._not_before_s = min(self._due_s.values(), default=math.inf)
        return late

    def replicas(self) -> set[ReplicaId]:
        """Those that have a deadline."""
        return set(self._due_s)
