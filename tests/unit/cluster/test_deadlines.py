"""Deadlines: named once, never late, cheap to move."""

import math

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.cluster.deadlines import Deadlines


@given(st.lists(st.tuples(st.sampled_from(["move", "clear", "look"]), st.integers(0, 4), st.integers(0, 50))))
def test_it_says_the_same_as_a_look_at_every_deadline(steps: list[tuple[str, int, int]]) -> None:
    deadlines, expected = Deadlines(), dict[int, float]()
    now_s = 0.0
    for what, replica_id, seconds in steps:
        match what:
            case "move":
                deadlines.move(replica_id, now_s + seconds)
                expected[replica_id] = now_s + seconds
            case "clear":
                deadlines.clear(replica_id)
                expected.pop(replica_id, None)
            case _:
                now_s += seconds
                late = {it for it, due_s in expected.items() if due_s <= now_s}
                assert set(deadlines.passed(now_s)) == late
                expected = {it: due_s for it, due_s in expected.items() if it not in late}
        assert deadlines.next_s <= min(expected.values(), default=math.inf)
        assert deadlines.replicas() == set(expected)
    deadlines.passed(now_s)
    assert deadlines.passed(now_s) == []
