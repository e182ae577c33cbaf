"""Idle seconds are put down to what the engine waits for at each moment, whatever overlaps."""

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.idle_clock import IdleClock


def test_the_causes_of_a_replicas_first_and_last_minutes() -> None:
    """1. no unit yet  2. one is read  3. generated  4. published while another is prepared  5. nothing left"""
    clock = IdleClock()
    clock.idle(0.0)
    clock.entered("preparing", 2.0)
    clock.busy(5.0)
    clock.left("preparing", 5.0)
    clock.idle(60.0)
    clock.entered("publishing", 60.0)
    clock.entered("preparing", 61.0)
    clock.left("preparing", 64.0)
    clock.left("publishing", 65.0)
    assert clock.seconds(75.0) == {"no_unit": 2.0 + 10.0, "preparing": 3.0 + 3.0, "publishing": 1.0 + 1.0}


def test_a_busy_engine_waits_for_nothing_whatever_its_units_do() -> None:
    clock = IdleClock()
    clock.entered("preparing", 1.0)
    clock.entered("publishing", 2.0)
    assert set(clock.seconds(100.0).values()) == {0.0}


@given(st.lists(st.tuples(st.sampled_from(["idle", "busy", "preparing", "publishing"]), st.floats(0, 10))))
def test_the_causes_add_up_to_the_idle_time(moments: list[tuple[str, float]]) -> None:
    clock, now_s, idle_s, is_idle = IdleClock(), 0.0, 0.0, False
    for what, pause_s in moments:
        now_s += pause_s
        idle_s += pause_s if is_idle else 0.0
        if what in ("idle", "busy"):
            is_idle = what == "idle"
            (clock.idle if is_idle else clock.busy)(now_s)
        else:
            clock.entered("preparing" if what == "preparing" else "publishing", now_s)
    assert abs(sum(clock.seconds(now_s).values()) - idle_s) < 1e-6
