"""When a share of completions that are amiss stops a run, and what a new run knows of the last one's."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.quality_watch import WINDOW, QualityWatch, UnitQuality, quality_of_earlier_runs
from batchinfer.records import UnitResult
from batchinfer.storage.events import Event


def unit(number: int, num_rows: int = 10, *, n: int = 1, **counts: int) -> UnitQuality:
    return UnitQuality(f"u{number}", num_rows, num_rows * n, counts)


def watch(units: Iterable[UnitQuality], min_rows: int = 20, **limits: float) -> QualityWatch:
    found = QualityWatch(limits, min_rows)  # type: ignore[arg-type]
    for each in units:
        found.add(each)
    return found


def test_nothing_is_decided_before_enough_rows_are_committed() -> None:
    bad = [unit(0, empty=10), unit(1, empty=10)]
    assert watch(bad[:1], empty=0.1).passed is None
    passed = watch(bad, empty=0.1).passed
    assert passed is not None
    assert (passed.kind, passed.num_amiss, passed.num_completions, passed.share) == ("empty", 20, 20, 1.0)
    assert passed.unit_ids == ("u1", "u0")


def test_a_share_at_its_limit_is_allowed_and_one_above_is_not() -> None:
    assert watch([unit(0, truncated=1), unit(1, truncated=1)], truncated=0.1).passed is None
    assert watch([unit(0, truncated=1), unit(1, truncated=2)], truncated=0.1).passed is not None
    assert watch([unit(0), unit(1, truncated=1)], truncated=0.0).passed is not None


def test_what_has_no_limit_is_only_counted_and_only_guilty_units_are_named() -> None:
    assert watch([unit(0, empty=10), unit(1, empty=10)], repeating=0.1).passed is None
    passed = watch([unit(0, repeating=9), unit(1), unit(2, repeating=1, empty=9)], repeating=0.1).passed
    assert passed is not None
    assert passed.unit_ids == ("u2", "u0")


def test_shares_are_of_completions_and_rows_are_what_is_waited_for() -> None:
    """Four samples a row: 20 rows are 80 completions."""
    assert watch([unit(0, n=4, empty=40)], empty=0.1).passed is None
    passed = watch([unit(0, n=4, empty=40), unit(1, n=4)], empty=0.1).passed
    assert passed is not None
    assert passed.share == 0.5


def test_an_input_that_turns_bad_late_is_noticed_and_an_early_stain_is_forgotten() -> None:
    good = [unit(number) for number in range(1000)]
    late = watch([*good, *(unit(1000 + number, empty=10) for number in range(WINDOW))], empty=0.3)
    assert late.passed is not None
    early = [unit(2000 + number, empty=3) for number in range(2)]
    assert watch(early, empty=0.29).passed is not None
    assert watch([*early, *good], empty=0.29).passed is None


def test_the_window_is_no_longer_than_it_has_to_be() -> None:
    passed = watch((unit(number, empty=1) for number in range(3 * WINDOW)), min_rows=10, empty=0.0).passed
    assert passed is not None
    assert passed.num_completions == WINDOW * 10


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 20))
def test_the_window_holds_the_newest_units_that_have_enough_rows(sizes: list[tuple[int, int]], min_rows: int) -> None:
    units = [unit(number, rows, empty=min(rows, bad)) for number, (rows, bad) in enumerate(sizes)]
    window: list[UnitQuality] = []
    for each in reversed(units):
        if sum(it.num_rows for it in window) >= WINDOW * min_rows:
            break
        window.append(each)
    num_rows, num_bad = sum(it.num_rows for it in window), sum(it.counts["empty"] for it in window)
    passed = watch(units, min_rows, empty=0.5).passed
    assert (passed is not None) == (num_rows >= min_rows and num_bad > 0.5 * num_rows)
    if passed is not None:
        assert (passed.num_amiss, passed.num_completions) == (num_bad, num_rows)


def test_dead_letters_do_not_count() -> None:
    result = UnitResult("u", 10, 4, 6, 4, 4, 0.0, quality={"empty": 4})
    assert UnitQuality.of(result) == UnitQuality("u", 4, 4, {"empty": 4})
    assert UnitQuality.of(UnitResult("u", 10, 40, 0, 4, 4, 0.0)).num_rows == 10


def event(kind: str, **fields: object) -> Event:
    return {"at": "2026-11-23T00:00:00+00:00", "event": kind, **fields}  # type: ignore[dict-item]


def committed(name: str, num_rows: int = 10, **quality: int) -> Event:
    return event("unit_committed", unit=name, num_rows=num_rows, num_completions=num_rows, quality=quality)


def test_a_new_run_knows_what_earlier_ones_saw_of_units_that_still_count() -> None:
    """1. a run commits a, b and c, b told of twice  2. c's shard is taken out of the input  3. another one adds d."""
    events = [
        event("run_started", run="1", scripts=[]),
        *(committed("a", empty=1), committed("b", empty=2), committed("b", empty=2), committed("c", empty=10)),
        event("run_finished"),
        event("run_started", run="2", scripts=[]),
        committed("d"),
    ]
    found = list(quality_of_earlier_runs(events, {"a", "b", "d"}, ()))
    assert [(it.unit_id, dict(it.counts)) for it in found] == [("a", {"empty": 1}), ("b", {"empty": 2}), ("d", {})]


def test_what_a_stopped_run_still_committed_does_not_change_the_verdict() -> None:
    events = [
        event("run_started", run="1", scripts=[]),
        committed("a", empty=10),
        event("run_stopped", reason="quality"),
        committed("b"),
        event("run_started", run="2", scripts=[]),
        committed("c"),
        event("run_stopped", reason="signal"),
        committed("d"),
    ]
    assert [it.unit_id for it in quality_of_earlier_runs(events, {*"abcd"}, ())] == ["a", "c", "d"]


@pytest.mark.parametrize(
    "started",
    [event("run_started", run="1", scripts=["latin"]), event("run_started", run="1")],
    ids=["another script", "an older version"],
)
def test_what_was_judged_by_other_rules_is_left_out(started: Event) -> None:
    assert list(quality_of_earlier_runs([started, committed("a", wrong_script=10)], {"a"}, ("hangul",))) == []


def test_events_without_quality_are_left_out() -> None:
    events = [event("run_started", run="1", scripts=[]), event("unit_committed", unit="a", num_rows=10)]
    assert list(quality_of_earlier_runs(events, {"a"}, ())) == []
