"""What the live view draws: every replica, or a summary of very many; on wide and on narrow terminals."""

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from batchinfer.live_table import MAX_LINES, NUM_SLOWEST, live_table
from batchinfer.telemetry import EngineUse, ReplicaLook, ReplicaState, RunProgress


def replica(number: int, state: ReplicaState = "running", **values: Any) -> ReplicaLook:
    busy: dict[str, Any] = {
        "node": "node-a",
        "device": "cuda:0",
        "num_units": 3,
        "prompt_tokens_per_s": 1000.0 + number,
        "completion_tokens_per_s": 2000.0 - number,
        "batch_fill": 0.97,
        "kv_use": 0.81,
        "idle_share": 0.01,
        "num_preemptions": 4,
    }
    return ReplicaLook(number, state, **{**(busy if state == "running" else {}), **values})


RUN = RunProgress(
    elapsed_s=75.0,
    num_rows=1000,
    num_rows_committed=200,
    num_rows_finished=50,
    num_units=100,
    num_units_committed=20,
    num_units_pending=75,
    num_units_in_flight=4,
    num_units_given_up=1,
    num_dead_letters=9,
    dead_letters_by_type={"empty": 2, "too_long": 5},
    prompt_tokens_per_s=1234.0,
    completion_tokens_per_s=567.0,
    eta_s=225.0,
    eta_range_s=(200.0, 250.0),
    engines=EngineUse(48, 64, kv_use=0.63, idle_share=0.02),
)


def drawn(progress: RunProgress, width: int = 120) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(live_table(progress, width))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_head_shows_rows_rates_queue_dead_letters_and_the_time_left_with_its_range() -> None:
    head = "\n".join(drawn(RUN))
    for piece in (
        "25% 250 of 1,000 rows ETA 3m45s (3m20s to 4m10s)",
        "1,234 in 567 out tok/s, batch 75%, KV 63%, idle 2%",
        "units: 20 of 100 committed, 4 in flight, 75 pending, 1 given up",
        "9 dead letters: too_long 5, empty 2, others 2",
    ):
        assert piece in head


def test_nothing_is_said_of_what_there_is_not() -> None:
    text = "\n".join(drawn(RunProgress(num_rows=10)))
    for word in ("dead letters", "ETA", "given up", "replica"):
        assert word not in text


def test_each_of_a_few_replicas_has_a_line() -> None:
    lines = drawn(
        replace(RUN, replicas=(replica(0), replica(1, "starting"), replica(2, "draining"), replica(3, "dead")))
    )
    assert lines[-4].split() == ["0", "running", "node-a", "cuda:0", "1,000", "2,000", "97%", "81%", "1%", "3", "4"]
    assert [line.split()[:2] for line in lines[-3:]] == [["1", "starting"], ["2", "draining"], ["3", "dead"]]


def test_very_many_are_summed_up_by_state_with_the_slowest_named() -> None:
    replicas = (*(replica(number) for number in range(MAX_LINES + 1)), replica(99, "starting"))
    lines = drawn(replace(RUN, replicas=replicas))
    total = [line.split() for line in lines if line.split()[:2] == ["13", "running"]]
    assert total == [["13", "running", "node-a", "cuda:0", "13,078", "25,922", "97%", "81%", "1%", "39", "52"]]
    assert ["1", "starting"] in [line.split() for line in lines]
    named = [line.split()[0] for line in lines if line.lstrip().startswith("#")]
    assert named == [f"#{number}" for number in range(12, 12 - NUM_SLOWEST, -1)]


def test_nodes_are_counted_where_they_differ() -> None:
    replicas = tuple(replica(number, node=f"node-{number % 3}") for number in range(MAX_LINES + 1))
    assert "3 of them" in "\n".join(drawn(replace(RUN, replicas=replicas)))


@pytest.mark.parametrize("width", [200, 100, 99, 80, 70, 60])
def test_replicas_take_one_line_each_on_every_terminal(width: int) -> None:
    lines = drawn(replace(RUN, replicas=tuple(replica(number, node="n" * 50) for number in range(8))), width)
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[-8:]] == [str(number) for number in range(8)]
    for line in lines[-8:]:
        assert "81%" in line
        assert "…" not in line.replace("n…", "")


def test_names_from_outside_draw_no_markup_and_no_terminal_commands() -> None:
    hostile = replica(0, node="[red]n\x1b[2J", device="[/]")
    text = "\n".join(drawn(replace(RUN, replicas=(hostile,), dead_letters_by_type={"[bold]x\x1b[2J": 9})))
    assert "[red]n\\x1b" in text
    assert "[bold]x\\x1b[2J 9" in text
    assert "\x1b" not in text
