"""Looks at a run as metrics: names Prometheus takes, counters that only grow, gauges of what is there now."""

import re
from collections import Counter
from dataclasses import replace

from batchinfer.run_metrics import METRICS, REPLICA_TAGS, RUN_TAGS, RunMetrics, Sample
from batchinfer.telemetry import ReplicaLook, RunProgress

RUN = RunProgress(
    num_rows=1000,
    num_rows_committed=300,
    num_rows_finished=50,
    num_units=10,
    num_units_committed=3,
    num_units_in_flight=2,
    num_units_pending=4,
    num_units_given_up=1,
    num_dead_letters=5,
    num_replicas_died=1,
    dead_letters_by_type={"too_long": 3, "empty": 2},
    num_completions=195,
    quality={"truncated": 7},
    eta_s=75.0,
    replicas=(
        ReplicaLook(
            0,
            "running",
            node="node-a",
            num_units=2,
            batch_fill=0.5,
            kv_use=0.25,
            num_prompt_tokens=100,
            num_completion_tokens=200,
            num_preemptions=3,
            idle_s=1.5,
            num_storage_retries=4,
            num_journal_flushes=5,
            journal_s=0.5,
        ),
        ReplicaLook(1, "starting"),
        ReplicaLook(2, "dead", error="its process ended"),
    ),
    unit_seconds=(12.5, 13.5),
)


def told(metrics: RunMetrics, progress: RunProgress) -> dict[tuple[str, str], float]:
    """(name, value of the last tag if it has one of its own) -> sum of what was recorded."""
    sums: Counter[tuple[str, str]] = Counter()
    for sample in metrics.samples(progress):
        own = [sample.tags[name] for name in sample.metric.tags if name not in (*RUN_TAGS, "node")]
        sums[(sample.metric.name, own[0] if own else "")] += sample.value  # type: ignore[assignment]
    return dict(sums)


def test_names_follow_prometheus() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"batchinfer_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.tags[:2] == RUN_TAGS
        assert metric.description


def test_the_first_look_tells_everything() -> None:
    assert told(RunMetrics("job", "run-1", 100), RUN) == {
        ("batchinfer_rows", "committed"): 300,
        ("batchinfer_rows", "finished"): 50,
        ("batchinfer_rows", "pending"): 650,
        ("batchinfer_rows_committed_total", ""): 200,
        ("batchinfer_units", "committed"): 3,
        ("batchinfer_units", "in_flight"): 2,
        ("batchinfer_units", "pending"): 4,
        ("batchinfer_units", "given_up"): 1,
        ("batchinfer_unit_seconds", ""): 26.0,
        ("batchinfer_dead_letters_total", "too_long"): 3,
        ("batchinfer_dead_letters_total", "empty"): 2,
        ("batchinfer_completions_total", ""): 195,
        ("batchinfer_poor_completions_total", "truncated"): 7,
        ("batchinfer_eta_seconds", ""): 75.0,
        ("batchinfer_replicas", "starting"): 1,
        ("batchinfer_replicas", "running"): 1,
        ("batchinfer_replicas", "draining"): 0,
        ("batchinfer_replica_deaths_total", ""): 1,
        ("batchinfer_prompt_tokens_total", "0"): 100,
        ("batchinfer_completion_tokens_total", "0"): 200,
        ("batchinfer_batch_fill_ratio", "0"): 0.5,
        ("batchinfer_kv_use_ratio", "0"): 0.25,
        ("batchinfer_replica_idle_seconds_total", "0"): 1.5,
        ("batchinfer_replica_units", "0"): 2,
        ("batchinfer_preemptions_total", "0"): 3,
        ("batchinfer_storage_retries_total", "0"): 4,
        ("batchinfer_journal_flushes_total", "0"): 5,
        ("batchinfer_journal_seconds_total", "0"): 0.5,
    }
    assert {sample.metric for sample in RunMetrics("job", "run-1", 0).samples(RUN)} == set(METRICS)


def test_tags_are_those_a_metric_has() -> None:
    for sample in RunMetrics("job", "run-1", 0).samples(RUN):
        assert tuple(sorted(sample.tags)) == tuple(sorted(sample.metric.tags))
        assert (sample.tags["job_name"], sample.tags["run_id"]) == ("job", "run-1")
        if sample.metric.tags == REPLICA_TAGS:
            assert (sample.tags["replica"], sample.tags["node"]) == ("0", "node-a")


def counters(samples: list[Sample]) -> dict[str, float]:
    return {sample.metric.name: sample.value for sample in samples if sample.metric.kind == "counter"}


def test_counters_grow_by_what_is_new_and_say_nothing_otherwise() -> None:
    metrics = RunMetrics("job", "run-1", 100)
    list(metrics.samples(RUN))
    assert counters(list(metrics.samples(RUN))) == {}
    more = replace(
        RUN,
        num_rows_committed=310,
        dead_letters_by_type={"too_long": 4, "empty": 2},
        replicas=(replace(RUN.replicas[0], num_completion_tokens=250),),
    )
    assert counters(list(metrics.samples(more))) == {
        "batchinfer_rows_committed_total": 10,
        "batchinfer_dead_letters_total": 1,
        "batchinfer_completion_tokens_total": 50,
    }


def test_a_count_that_falls_is_no_growth_and_not_counted_twice() -> None:
    metrics = RunMetrics("job", "run-1", 0)
    list(metrics.samples(RUN))
    list(metrics.samples(replace(RUN, num_rows_committed=290)))
    assert counters(list(metrics.samples(RUN))) == {}


def test_a_replica_that_is_gone_is_counted_to_its_end_and_is_no_gauge() -> None:
    metrics = RunMetrics("job", "run-1", 0)
    list(metrics.samples(RUN))
    gone = replace(RUN, replicas=(), replicas_gone=(replace(RUN.replicas[0], num_completion_tokens=230),))
    samples = list(metrics.samples(gone))
    assert counters(samples) == {"batchinfer_completion_tokens_total": 30}
    assert "batchinfer_replica_units" not in {sample.metric.name for sample in samples}


def test_a_replica_in_the_place_of_another_counts_from_zero() -> None:
    metrics = RunMetrics("job", "run-1", 0)
    list(metrics.samples(RUN))
    successor = replace(RUN, replicas=(replace(RUN.replicas[0], replica_id=3, num_completion_tokens=7),))
    assert counters(list(metrics.samples(successor)))["batchinfer_completion_tokens_total"] == 7
