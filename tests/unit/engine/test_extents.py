from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.extents import Extents
from batchinfer.engine.step_plan import Extent


def taken(extents: Extents, num_places: int) -> Extent:
    extent = extents.allocate(num_places)
    assert extent is not None
    return extent


def test_capacities_are_whole_granules() -> None:
    extents = Extents(100, granule=16)
    assert extents.num_places == 96
    assert extents.allocate(1) == Extent(0, 16)
    assert extents.allocate(17) == Extent(16, 32)
    assert extents.num_used == 48
    extents.check()


def test_the_smallest_run_that_fits_is_taken() -> None:
    extents = Extents(100, granule=1)
    runs = [taken(extents, size) for size in (30, 5, 10, 5, 50)]
    extents.free(runs[0])
    extents.free(runs[2])
    assert extents.largest_free == 30
    assert extents.allocate(8) == Extent(35, 8)
    assert extents.allocate(8) == Extent(0, 8)


def test_none_when_no_run_is_long_enough_although_enough_is_free() -> None:
    extents = Extents(40, granule=10)
    runs = [taken(extents, 10) for _ in range(4)]
    for run in (runs[0], runs[2]):
        extents.free(run)
    assert extents.num_free == 20
    assert extents.largest_free == 10
    assert extents.allocate(20) is None


def test_freed_neighbours_become_one_run() -> None:
    extents = Extents(40, granule=10)
    runs = [taken(extents, 10) for _ in range(4)]
    for index in (0, 2, 1, 3):
        extents.free(runs[index])
        extents.check()
    assert extents.largest_free == 40


def test_an_extent_is_extended_into_the_free_run_behind_it() -> None:
    extents = Extents(100, granule=10)
    first, second, third = (taken(extents, 30) for _ in range(3))
    extents.free(second)
    assert extents.extend(first, 35) == Extent(0, 40)
    assert extents.extend(third, 100) is None
    assert extents.extend(third, 40) == Extent(60, 40)
    assert extents.num_free == extents.largest_free == 20
    extents.check()


def test_gathering_slides_extents_down_where_the_fewest_places_move() -> None:
    """Free: 10 at 0, 10 at 40, 10 at 60, 10 at 90; between them lie 30, 10 and 20 places."""
    extents = Extents(110, granule=10)
    free = [taken(extents, size) for size in (10, 30, 10, 10, 10, 20, 10, 10)][::2]
    for extent in free:
        extents.free(extent)
    assert extents.gather(15) == {50: Extent(40, 10)}
    extents.check()
    assert extents.allocate(20) == Extent(50, 20)
    assert extents.gather(10) == {}


def test_what_is_not_free_cannot_be_gathered() -> None:
    extents = Extents(40, granule=10)
    taken(extents, 20)
    with pytest.raises(ValueError, match="30 places cannot be gathered of 20"):
        extents.gather(21)


def test_freeing_twice_is_refused() -> None:
    extents = Extents(32, granule=16)
    run = taken(extents, 16)
    extents.free(run)
    with pytest.raises(ValueError, match="not allocated"):
        extents.free(run)


def test_an_empty_arena_or_extent_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no granule"):
        Extents(15, granule=16)
    with pytest.raises(ValueError, match="0 places"):
        Extents(16, granule=16).allocate(0)


@given(st.integers(1, 400), st.integers(1, 20), st.integers(0, 2**32))
def test_any_order_of_calls_keeps_the_arena_tiled(num_places: int, granule: int, seed: int) -> None:
    if num_places < granule:
        return
    dice = Random(seed)
    extents = Extents(num_places, granule)
    live: list[Extent] = []
    for _ in range(120):
        kind = dice.random()
        if kind < 0.5:
            wanted = dice.randint(1, 60)
            could = extents.round_up(wanted) <= extents.largest_free
            run = extents.allocate(wanted)
            assert (run is not None) == could
            if run is not None:
                assert run.capacity == extents.round_up(wanted)
                live.append(run)
        elif live and kind < 0.75:
            extents.free(live.pop(dice.randrange(len(live))))
        elif live and kind < 0.9:
            index = dice.randrange(len(live))
            wanted = live[index].capacity + dice.randint(1, 40)
            run = extents.extend(live[index], wanted)
            if run is not None:
                assert run == Extent(live[index].offset, extents.round_up(wanted))
                live[index] = run
        elif extents.num_free:
            wanted = dice.randint(1, extents.num_free)
            moved = extents.gather(wanted)
            live = [moved.pop(run.offset, run) for run in live]
            assert not moved
            assert extents.largest_free >= extents.round_up(wanted)
        extents.check()
        assert extents.num_used == sum(run.capacity for run in live)
    for run in live:
        extents.free(run)
    extents.check()
    assert extents.largest_free == extents.num_places == extents.num_free
