"""The actors of a run and what is asked of them: calls go out here, answers come back in the order they arrive.

Ray calls back for each answer, so that one costs the same however many are awaited; ``ray.wait`` looks at all of
them each time, which a thousand replicas with a few units each would feel.
"""

import queue
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import ray
import ray.exceptions
from ray import ObjectRef
from ray.actor import ActorHandle

from batchinfer.cluster.messages import Assignment, Failure, ReplicaSetup
from batchinfer.cluster.replica import Replica, start_actor

#: The actor's methods that carry a work unit.
UnitMethod = Literal["generate", "probe"]
#: Answers handed out at once, so that time passes between them however fast they come.
MAX_ANSWERS = 1000

_NODE_DIED = "its node has died"


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """Ray's word that the actor is no more; ``node_died``: because its machine is."""

    error: str
    node_died: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one call: the method's own value, or :class:`ReplicaGone`.

    ``assignment`` is set where the call was for a unit.
    """

    method: Literal["start", "progress", "drain"] | UnitMethod
    replica_id: int
    value: object
    assignment: Assignment | None = None


class ReplicaPool:
    """Starts actors, calls them and ends them. Every method belongs to the driver's thread."""

    def __init__(self) -> None:
        self._actors: dict[int, ActorHandle[Replica]] = {}
        self._inbox: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def __contains__(self, replica_id: int) -> bool:
        return replica_id in self._actors

    def start(self, replica_id: int, setup: ReplicaSetup) -> None:
        """Ask for an actor and have it load its model; Ray lets it wait for resources if it must."""
        actor = start_actor(setup, name=f"batchinfer-{setup.run_id}-{replica_id}")
        self._actors[replica_id] = actor
        self._await(actor.start.remote(), lambda value: Answer("start", replica_id, value))

    def assign(self, replica_id: int, method: UnitMethod, assignment: Assignment) -> None:
        """Give a replica a unit, or rows of one to try."""
        ref: ObjectRef[object] = getattr(self._actors[replica_id], method).remote(assignment)
        self._await(ref, lambda value: Answer(method, replica_id, value, assignment))

    def ask_progress(self, replica_id: int) -> None:
        """Have a replica say how it goes; none of its calls waits for this one."""
        self._await(self._actors[replica_id].progress.remote(), lambda value: Answer("progress", replica_id, value))

    def drain(self, replica_id: int) -> None:
        """Have a replica journal what it has in flight and generate nothing more."""
        self._await(self._actors[replica_id].drain.remote(), lambda value: Answer("drain", replica_id, value))

    def stop(self, replica_id: int) -> None:
        """End the actor for good; nothing happens if it is gone. Answers still under way from it are dropped."""
        actor = self._actors.pop(replica_id, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def stop_all(self) -> None:
        """End every actor."""
        for replica_id in tuple(self._actors):
            self.stop(replica_id)

    def answers(self, timeout_s: float) -> list[Answer]:
        """What has come back since, after waiting up to ``timeout_s`` for the first.

        An actor may be stopped between two answers of one list; whoever reads it looks again with ``in``.
        """
        found: list[Answer] = []
        try:
            found.append(self._inbox.get(timeout=timeout_s))
            while len(found) < MAX_ANSWERS:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return [answer for answer in found if answer.replica_id in self._actors]

    def _await(self, ref: "ObjectRef[object]", answer: Callable[[object], Answer]) -> None:
        def arrived(future: "Future[object]") -> None:
            # On a thread of Ray's, which must not be held up.
            error = future.exception()
            self._inbox.put(answer(future.result() if error is None else _failure(error)))

        ref.future().add_done_callback(arrived)


def _failure(error: BaseException) -> Failure | ReplicaGone:
    if isinstance(error, ray.exceptions.RayTaskError):
        # Replicas answer with Failure values; what arrives as an exception is a mistake of ours.
        return Failure("replica", type(error.cause).__name__, str(error.cause))
    text = " ".join(str(error).split())
    node_died = _NODE_DIED in text or bool(getattr(error, "preempted", False))
    return ReplicaGone(f"{type(error).__name__}: {_cause_of_death(error, text)}", node_died)


def _cause_of_death(error: BaseException, text: str) -> str:
    """The sentence of Ray's page-long message that says how the worker ended, else its first line."""
    match = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]+)", text)
    if match is not None:
        return f"its process ended, {match[1]}: {match[2]}"
    match = re.search(rf"{_NODE_DIED}\. Node Id: \w+(.*)", text)
    if match is not None:
        return f"{_NODE_DIED}:{match[1]}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
