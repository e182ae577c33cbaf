"""Replicas are asked one question at a time, at a bounded rate, and told once that their machine goes."""

from batchinfer.cluster.replica_watch import (
    MAX_PROGRESS_PER_S,
    MAX_STATS_PER_S,
    PROGRESS_INTERVAL_S,
    STATS_INTERVAL_S,
    ReplicaWatch,
)


def test_a_replica_is_asked_at_once_and_again_only_after_it_has_answered() -> None:
    watch = ReplicaWatch()
    watch.ready(0, "node", 10.0)
    assert watch.due(10.0) == [0]
    assert watch.due(1000.0) == []
    watch.answered(0, 20.0)
    assert watch.due(20.0 + PROGRESS_INTERVAL_S - 0.01) == []
    assert watch.due(20.0 + PROGRESS_INTERVAL_S) == [0]


def test_a_replica_that_is_gone_is_not_asked() -> None:
    watch = ReplicaWatch()
    watch.ready(0, "node", 0.0)
    watch.gone(0)
    watch.gone(0)
    assert watch.due(100.0) == []
    assert watch.replicas() == ()


def test_a_thousand_replicas_are_asked_at_a_bounded_rate() -> None:
    watch = ReplicaWatch()
    for replica_id in range(1000):
        watch.ready(replica_id, "node", 0.0)
    num_questions = num_recorded = 0
    for step in range(6000):
        for replica_id in watch.due(step * 0.1):
            num_questions += 1
            num_recorded += watch.answered(replica_id, step * 0.1)
    assert 0.8 * 600 * MAX_PROGRESS_PER_S < num_questions <= 600 * MAX_PROGRESS_PER_S + 1000
    assert 0 < num_recorded <= 600 * MAX_STATS_PER_S + 1000


def test_counters_are_recorded_every_half_minute() -> None:
    watch = ReplicaWatch()
    watch.ready(0, "node", 0.0)
    recorded = [second for second in range(100) if watch.answered(0, float(second))]
    assert recorded == [int(STATS_INTERVAL_S), int(2 * STATS_INTERVAL_S), int(3 * STATS_INTERVAL_S)]


def test_replicas_of_a_machine_that_goes_are_named_once() -> None:
    watch = ReplicaWatch()
    for replica_id, node in enumerate(("a", "b", "a")):
        watch.ready(replica_id, node, 0.0)
    assert watch.evict(frozenset()) == []
    assert watch.evict(frozenset({"a", "elsewhere"})) == [0, 2]
    assert watch.evict(frozenset({"a"})) == []
    assert watch.is_evicted(2)
    assert not watch.is_evicted(1)
