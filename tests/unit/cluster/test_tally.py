"""The counting of a run: rates, what is left, and totals that survive the replicas they came from."""

from dataclasses import replace

import pytest

from batchinfer.cluster.messages import ReplicaProgress, ReplicaStarted
from batchinfer.cluster.queue_messages import QueueLook, Standing
from batchinfer.cluster.tally import DEAD_SHOWN_S, Tally
from batchinfer.engine.engine import EngineStats
from batchinfer.records import UnitResult
from batchinfer.telemetry import EngineUse


def tally(num_rows: int = 100, samples_per_row: int = 1, before: int = 0) -> Tally:
    return Tally(
        num_rows=num_rows,
        num_units=num_rows // 10,
        num_rows_before=before,
        num_units_before=before // 10,
        num_dead_letters_before=1 if before else 0,
        samples_per_row=samples_per_row,
    )


def started(capacity: int = 10) -> ReplicaStarted:
    return ReplicaStarted(capacity, "fake", "cuda:0", "node-a", 1.0)


def counts(reporting: Tally, replica_id: int, stats: EngineStats, at_s: float = 0.0, idle_s: float = 0.0) -> None:
    """A replica, ready at 0 with room for 10 sequences, reports."""
    if replica_id not in reporting._live:
        reporting.replica_ready(replica_id, started(), 0.0)
    reporting.replica_reported(replica_id, ReplicaProgress(stats, idle_s_by_cause={"units": idle_s}), at_s)


def unit(
    num_rows: int = 10, num_dead_letters: int = 0, *, unit_id: str = "unit", already_committed: bool = False
) -> UnitResult:
    return UnitResult(
        unit_id=unit_id,
        num_rows=num_rows,
        num_completions=num_rows - num_dead_letters,
        num_dead_letters=num_dead_letters,
        num_prompt_tokens=20 * num_rows,
        num_completion_tokens=30 * num_rows,
        elapsed_s=1.0,
        already_committed=already_committed,
        dead_letters_by_type={"too_long": num_dead_letters} if num_dead_letters else {},
    )


def stats(num_finished: int) -> EngineStats:
    return EngineStats(
        num_finished=num_finished, num_prompt_tokens=20 * num_finished, num_completion_tokens=30 * num_finished
    )


def test_units_add_up() -> None:
    count = tally(before=20)
    count.unit_committed(0, unit(10, num_dead_letters=2))
    count.unit_committed(1, unit(10, num_dead_letters=1, unit_id="other"))
    seen = count.progress(1.0, 1.0, QueueLook(num_ready=2, num_starting=1, num_units_given_up=3))
    assert (seen.num_rows, seen.num_rows_committed) == (100, 40)
    assert (seen.num_units, seen.num_units_committed) == (10, 4)
    assert seen.num_dead_letters == 4
    assert seen.dead_letters_by_type == {"too_long": 3}
    assert (seen.num_replicas_ready, seen.num_replicas_starting, seen.num_units_given_up) == (2, 1, 3)
    assert (count.num_completions, count.num_prompt_tokens, count.num_completion_tokens) == (17, 400, 600)


def test_rows_that_took_anothers_tokens_are_counted_and_do_not_hide_rows_in_flight() -> None:
    """1. A unit commits ten rows, of which the engine finished four. 2. It finishes three rows of the next unit."""
    count = tally(samples_per_row=2)
    counts(count, 0, stats(8))
    count.unit_committed(0, replace(unit(10), num_shared_sequences=12))
    counts(count, 0, stats(14))
    seen = count.progress(1.0, 1.0, QueueLook(num_ready=1))
    assert (seen.num_shared_sequences, seen.num_rows_committed, seen.num_rows_finished) == (12, 10, 3)


def test_a_unit_found_committed_counts_like_one_committed_now() -> None:
    """Its first writer died before it could say so, so nobody has counted it."""
    count = tally()
    count.unit_committed(0, unit(10, already_committed=True))
    assert (count.num_rows_committed, count.num_units_committed, count.num_completions) == (10, 1, 10)


def test_rates_and_the_time_left_come_from_the_readings_between_two_looks() -> None:
    count = tally(num_rows=100)
    counts(count, 0, stats(0))
    assert count.progress(10.0, 0.0, QueueLook(num_ready=1)).eta_s is None
    counts(count, 0, stats(20))
    seen = count.progress(12.0, 2.0, QueueLook(num_ready=1))
    assert seen.prompt_tokens_per_s == pytest.approx(200)
    assert seen.completion_tokens_per_s == pytest.approx(300)
    assert seen.num_rows_finished == 20
    assert seen.eta_s == pytest.approx(8.0)


def test_rates_are_of_the_last_half_minute_alone() -> None:
    count = tally(num_rows=10_000)
    for second in range(100):
        counts(count, 0, stats(10 * min(second, 50)))
        seen = count.progress(float(second), float(second), QueueLook(num_ready=1))
    assert seen.num_completion_tokens == 30 * 500
    assert seen.completion_tokens_per_s == 0.0
    assert seen.eta_s is None


def test_finished_rows_are_those_not_committed_yet() -> None:
    count = tally()
    counts(count, 0, stats(15))
    count.unit_committed(0, unit(10))
    seen = count.progress(1.0, 1.0, QueueLook(num_ready=1))
    assert (seen.num_rows_committed, seen.num_rows_finished) == (10, 5)


def test_samples_of_a_row_count_as_one_row() -> None:
    count = tally(samples_per_row=4)
    counts(count, 0, stats(19))
    assert count.progress(1.0, 1.0, QueueLook(num_ready=1)).num_rows_finished == 4


def test_rows_that_never_reached_the_engine_do_not_make_finished_rows_negative() -> None:
    count = tally()
    counts(count, 0, stats(2))
    count.unit_committed(0, unit(10, num_dead_letters=8))
    assert count.progress(1.0, 1.0, QueueLook(num_ready=1)).num_rows_finished == 0


def test_a_dead_replica_takes_its_unfinished_rows_but_not_its_tokens() -> None:
    count = tally()
    counts(count, 0, stats(25))
    counts(count, 1, stats(5))
    count.unit_committed(0, unit(20))
    before = count.progress(1.0, 1.0, QueueLook(num_ready=2))
    count.replica_gone(0, 1.0, "killed")
    after = count.progress(2.0, 2.0, QueueLook(num_ready=1))
    assert before.num_completion_tokens == after.num_completion_tokens == 900
    assert (before.num_rows_finished, after.num_rows_finished) == (10, 5)
    assert after.num_rows_committed == 20
    assert count.num_replicas_died == 1
    # What the replica in its place reports starts at zero and adds to that.
    counts(count, 2, stats(10))
    assert count.progress(3.0, 3.0, QueueLook(num_ready=2)).num_completion_tokens == 1200


def test_losing_unfinished_rows_never_shows_a_negative_rate() -> None:
    count = tally()
    counts(count, 0, stats(50))
    count.progress(1.0, 1.0, QueueLook(num_ready=1))
    count.replica_gone(0, 1.0, "killed")
    seen = count.progress(2.0, 2.0, QueueLook(num_starting=1))
    assert seen.completion_tokens_per_s == 0.0
    assert seen.eta_s is None


def test_a_replica_may_die_before_it_ever_reported() -> None:
    count = tally()
    count.replica_gone(7, 1.0, "killed")
    assert count.progress(1.0, 1.0, QueueLook(num_starting=1)).num_completion_tokens == 0


def test_a_unit_that_two_replicas_were_given_counts_once() -> None:
    """One was given up for dead, or drained, when it had just committed; the other one found the part."""
    count = tally()
    count.unit_committed(0, unit(10))
    count.unit_committed(1, unit(10, already_committed=True))
    assert (count.num_rows_committed, count.num_units_committed, count.num_completions) == (10, 1, 10)


def test_a_drained_replica_leaves_its_tokens_and_did_not_die() -> None:
    count = tally()
    counts(count, 0, stats(5))
    count.replica_gone(0, 1.0)
    assert count.num_replicas_died == 0
    assert count.progress(1.0, 1.0, QueueLook(num_ready=0)).num_completion_tokens == 150


def test_how_busy_the_engines_are_is_summed_over_the_living_replicas() -> None:
    count = tally()
    used = EngineStats(num_active=9, num_places=100, num_places_used=80, num_preemptions=2, num_prefix_hits=3)
    counts(count, 0, replace(used, num_prompt_tokens=60, num_completion_tokens=20, num_padding_tokens=20), 10.0, 1.0)
    counts(count, 1, replace(used, num_active=2, num_places_used=20), 10.0, 4.0)
    counts(count, 2, used, 10.0, 10.0)
    count.replica_gone(2, 1.0, "killed")
    use = count.progress(10.0, 10.0, QueueLook(num_ready=2)).engines
    assert (use.num_active, use.capacity, use.num_preemptions, use.num_prefix_hits) == (11, 20, 4, 6)
    assert (use.kv_use, use.padding_share, use.idle_share) == (0.5, 0.2, pytest.approx(0.25))


def test_before_any_replica_reports_there_is_no_use_to_show() -> None:
    count = tally()
    assert count.progress(1.0, 1.0, QueueLook(num_starting=1)).engines == EngineUse()
    count.replica_ready(0, started(), 1.0)
    use = count.progress(1.0, 1.0, QueueLook(num_ready=1)).engines
    assert (use.capacity, use.kv_use, use.idle_share, use.padding_share) == (10, None, None, None)


def test_the_idle_share_is_of_the_last_half_minute() -> None:
    """A replica that waited for its first unit for an hour and is busy since."""
    count = tally()
    counts(count, 0, EngineStats(), 3600.0, 3600.0)
    for second in range(3600, 3660):
        counts(count, 0, EngineStats(), float(second), 3600.0 + 0.25 * (second - 3600))
    assert count.progress(3660.0, 3660.0, QueueLook(num_ready=1)).engines.idle_share == pytest.approx(0.25)


def test_the_counters_of_a_replica_as_its_event_tells_them() -> None:
    count = tally()
    assert count.replica_stats(0) is None
    count.replica_ready(0, started(), 0.0)
    assert count.replica_stats(0) is None
    counts(count, 0, EngineStats(num_steps=7, num_active=5, num_places=3, num_places_used=1), 2.0, 0.5)
    told = count.replica_stats(0)
    assert told is not None
    assert (told["batch_fill"], told["kv_use"], told["idle_s"], told["num_steps"]) == (0.5, 0.3333, 0.5, 7)


def test_each_replica_is_told_of_with_its_place_in_the_queue() -> None:
    count = tally()
    busy = EngineStats(num_active=5, num_places=100, num_places_used=80, num_preemptions=2)
    counts(count, 0, busy, 0.0)
    for at_s, tokens in ((2.0, 200), (10.0, 1000)):
        now = replace(busy, num_prompt_tokens=tokens, num_completion_tokens=2 * tokens)
        counts(count, 0, now, at_s, idle_s=at_s / 4)
    standings = (Standing(0, "ready", 3), Standing(1, "starting", 0))
    running, starting = count.progress(10.0, 10.0, QueueLook(num_ready=1, num_starting=1, replicas=standings)).replicas
    assert (running.replica_id, running.state, running.node, running.device) == (0, "running", "node-a", "cuda:0")
    assert (running.prompt_tokens_per_s, running.completion_tokens_per_s) == (100.0, 200.0)
    assert (running.batch_fill, running.kv_use, running.idle_share) == (0.5, 0.8, 0.25)
    assert (running.num_units, running.num_preemptions) == (3, 2)
    assert (starting.replica_id, starting.state, starting.batch_fill) == (1, "starting", None)
    (draining,) = count.progress(11.0, 11.0, QueueLook(replicas=(Standing(0, "draining", 2),))).replicas
    assert (draining.state, draining.num_units) == ("draining", 2)


def test_a_dead_replica_is_told_of_for_a_while_and_one_that_was_not_needed_is_not() -> None:
    count = tally()
    counts(count, 0, EngineStats())
    counts(count, 1, EngineStats())
    count.replica_gone(0, 10.0, "its process ended")
    count.replica_gone(1, 10.0)
    (dead,) = count.progress(11.0, 11.0, QueueLook()).replicas
    assert (dead.replica_id, dead.state, dead.node, dead.error) == (0, "dead", "node-a", "its process ended")
    assert count.progress(10.0 + DEAD_SHOWN_S, 70.0, QueueLook()).replicas == ()


def test_the_last_words_of_a_replica_that_is_gone_are_told_once() -> None:
    count = tally()
    counts(count, 0, stats(5), 1.0)
    count.replica_gone(0, 2.0)
    (gone,) = count.progress(2.0, 2.0, QueueLook()).replicas_gone
    assert (gone.replica_id, gone.num_completion_tokens) == (0, 150)
    assert count.progress(3.0, 3.0, QueueLook()).replicas_gone == ()


def test_counters_of_storage_and_journals_reach_the_look() -> None:
    count = tally()
    count.replica_ready(0, started(), 0.0)
    told = ReplicaProgress(
        EngineStats(),
        idle_s_by_cause={"rows": 0.75, "units": 0.25},
        num_storage_retries=2,
        num_journal_flushes=3,
        journal_s=0.5,
    )
    count.replica_reported(0, told, 1.0)
    (look,) = count.progress(1.0, 1.0, QueueLook(num_ready=1)).replicas
    assert (look.idle_s, look.num_storage_retries, look.num_journal_flushes, look.journal_s) == (1.0, 2, 3, 0.5)


def test_seconds_of_units_are_told_once() -> None:
    count = tally()
    count.unit_committed(0, unit(10))
    assert count.progress(1.0, 1.0, QueueLook()).unit_seconds == (1.0,)
    assert count.progress(2.0, 2.0, QueueLook()).unit_seconds == ()


def test_the_time_left_comes_with_its_range_after_a_while() -> None:
    count = tally(num_rows=1000)
    for second in range(61):
        counts(count, 0, stats(10 * second), float(second))
        seen = count.progress(float(second), float(second), QueueLook(num_ready=1))
    assert seen.eta_s is not None
    assert abs(seen.eta_s - 40.0) < 2.0
    assert seen.eta_range_s is not None
    low_s, high_s = seen.eta_range_s
    assert low_s <= seen.eta_s <= high_s < 50.0
