"""The queue under a simulated cluster: what its work grows with, and how a job with deaths ends."""

import sys
from types import FrameType

import pytest

from tests.bench.queue_simulation import Cluster, Simulation


def num_operations(cluster: Cluster) -> int:
    """Bytecode instructions that the queue carries out in a whole simulated job."""
    count = 0

    def on_instruction(frame: FrameType, event: str, arg: object) -> object:
        nonlocal count
        count += event == "opcode"
        return on_instruction

    def on_call(frame: FrameType, event: str, arg: object) -> object:
        if "batchinfer/cluster" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return on_instruction

    simulation = Simulation(cluster)
    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        simulation.run()
    finally:
        sys.settrace(before)
    return count


def test_the_work_per_unit_does_not_grow_with_the_number_of_replicas() -> None:
    """Ten times the replicas, the same units: a walk over all replicas for each unit would show."""
    few, many = (
        num_operations(Cluster(2000, num_replicas, late_share=0, deaths_per_replica_hour=0, progress_interval_s=1e9))
        for num_replicas in (10, 100)
    )
    assert many < 1.3 * few


@pytest.mark.parametrize(
    ("num_units", "rows_per_unit", "max_tail_units"),
    # Of small units a replica holds two rounds; those of one that dies at the very end wait for others to run dry.
    [(6000, 1024, 2), (24_000, 32, 4)],
    ids=["large", "small"],
)
def test_with_deaths_and_latecomers_nobody_starves_and_the_tail_is_short(
    num_units: int, rows_per_unit: int, max_tail_units: int
) -> None:
    """A bad day: three in ten replicas die each hour."""
    cluster = Cluster(num_units, 100, rows_per_unit=rows_per_unit, deaths_per_replica_hour=0.3)
    simulation = Simulation(cluster)
    course = simulation.run()
    simulation.queue.validate()
    assert (course.outcome, course.num_commits) == ("done", num_units)
    assert course.num_deaths > 5
    assert course.idle_share < 0.001
    assert course.tail_s < max_tail_units * cluster.unit_s
    assert course.longest_wait_s < 20 * cluster.unit_s
