"""Idle seconds are put down to what the engine waits for at each moment, whatever overlaps."""

from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.idle_clock import IdleClock, Stage


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_causes_of_a_replicas_first_and_last_minutes() -> None:
    """1. no unit yet  2. one is read  3. generated  4. published while another is prepared  5. nothing left"""
    hands = Hands()
    clock = IdleClock(hands)
    with clock.idle():
        hands.now_s = 2.0
        with clock.stage("preparing"):
            hands.now_s = 5.0
    with clock.stage("generating"):
        hands.now_s = 60.0
    with clock.idle():
        with clock.stage("publishing"):
            hands.now_s = 61.0
            with clock.stage("preparing"):
                hands.now_s = 64.0
            hands.now_s = 65.0
        hands.now_s = 75.0
    assert clock.seconds() == {"units": 2.0 + 10.0, "rows": 3.0 + 3.0, "publishing": 1.0 + 1.0, "next_turns": 0.0}


def test_an_engine_between_two_turns_waits_for_the_next_ones() -> None:
    hands = Hands()
    clock = IdleClock(hands)
    with clock.stage("generating"), clock.idle():
        hands.now_s = 0.5
        assert clock.seconds()["next_turns"] == 0.5


def test_a_busy_engine_waits_for_nothing_whatever_its_units_do() -> None:
    hands = Hands()
    clock = IdleClock(hands)
    with clock.stage("preparing"), clock.stage("publishing"):
        hands.now_s = 100.0
        assert set(clock.seconds().values()) == {0.0}


@given(
    st.lists(st.tuples(st.sampled_from(["idle", "busy", "preparing", "generating", "publishing"]), st.floats(0, 10)))
)
def test_the_causes_add_up_to_the_idle_time(moments: list[tuple[Stage | str, float]]) -> None:
    hands = Hands()
    clock, idle_s, is_idle = IdleClock(hands), 0.0, False
    with ExitStack() as units:
        blocks = ExitStack()
        for what, pause_s in moments:
            hands.now_s += pause_s
            idle_s += pause_s if is_idle else 0.0
            if what in ("idle", "busy"):
                blocks.close()
                is_idle = what == "idle"
                if is_idle:
                    blocks.enter_context(clock.idle())
            else:
                units.enter_context(clock.stage(what))  # type: ignore[arg-type]
        assert abs(sum(clock.seconds().values()) - idle_s) < 1e-6
        blocks.close()
