"""What Ray says of an actor that did not answer, as the driver needs it."""

from concurrent.futures import Future

import pytest
import ray.exceptions

from batchinfer.cluster.messages import Failure
from batchinfer.cluster.replica_pool import Answer, ReplicaGone, ReplicaPool, _failure

WORKER_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Replica\n\tpid: 7\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. There are some potential root causes."
)
NODE_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Replica\n\tip: 10.0.0.2\n"
    "The actor died because its node has died. Node Id: acac7355\n"
    "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
)


class Died(ray.exceptions.RayActorError):
    def __init__(self, text: str, *, preempted: bool = False) -> None:
        super().__init__(error_msg=text, preempted=preempted)


def test_a_process_that_ended_is_told_in_one_sentence() -> None:
    gone = _failure(Died(WORKER_DIED))
    assert isinstance(gone, ReplicaGone)
    assert not gone.node_died
    assert gone.error == (
        "Died: its process ended, SYSTEM_ERROR: Worker unexpectedly exits with a connection error code 2"
    )


@pytest.mark.parametrize("error", [Died(NODE_DIED), Died("The actor died.", preempted=True)])
def test_a_machine_that_went_is_told_from_a_process_that_ended(error: Died) -> None:
    gone = _failure(error)
    assert isinstance(gone, ReplicaGone)
    assert gone.node_died
    assert "class_name" not in gone.error


def test_an_exception_of_ours_is_a_failure_of_the_replica() -> None:
    error = ray.exceptions.RayTaskError("generate", "traceback", ValueError("a mistake"))
    assert _failure(error) == Failure("replica", "ValueError", "a mistake")


class _Ref:
    """An answer on its way."""

    def __init__(self) -> None:
        self.future_of_it: Future[object] = Future()

    def future(self) -> "Future[object]":
        return self.future_of_it


def test_answers_come_in_the_order_they_arrive_and_those_of_stopped_replicas_do_not() -> None:
    pool = ReplicaPool()
    pool._actors = dict.fromkeys(range(3))  # type: ignore[arg-type]
    refs = [_Ref() for _ in range(3)]
    for replica_id, ref in enumerate(refs):
        pool._await(ref, lambda value, replica_id=replica_id: Answer("progress", replica_id, value))  # type: ignore[arg-type, misc]
    assert pool.answers(0.0) == []
    for replica_id in (2, 0, 1):
        refs[replica_id].future_of_it.set_result(f"answer of {replica_id}")
    del pool._actors[0]
    assert [answer.value for answer in pool.answers(1.0)] == ["answer of 2", "answer of 1"]
    assert pool.answers(0.0) == []
