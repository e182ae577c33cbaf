"""Who owns which places of the KV arena: contiguous runs, handed out, extended, slid together and taken back.

Plain integers. Free runs are kept by size (best fit) and by both ends (neighbours join at once when a run is freed),
so every call costs a few look-ups and one binary search, however many extents live.
"""

from bisect import bisect_left, insort

from batchinfer.engine.step_plan import Extent


class Extents:
    """Allocator over places [0, num_places). Capacities are whole granules; an incomplete last granule is not used."""

    def __init__(self, num_places: int, granule: int) -> None:
        """Raises ValueError if not even one granule fits."""
        if granule < 1 or num_places < granule:
            raise ValueError(f"{num_places} places hold no granule of {granule}; give the KV cache more memory")
        self.granule = granule
        self.num_places = num_places // granule * granule
        self.num_free = 0
        self._capacity_at: dict[int, int] = {}
        self._free_by_size: list[tuple[int, int]] = []
        self._free_by_start: dict[int, int] = {}
        self._free_by_end: dict[int, int] = {}
        self._insert(0, self.num_places)

    @property
    def num_used(self) -> int:
        return self.num_places - self.num_free

    @property
    def largest_free(self) -> int:
        """The largest capacity that ``allocate`` can give now."""
        return self._free_by_size[-1][0] if self._free_by_size else 0

    def is_live(self, extent: Extent) -> bool:
        return self._capacity_at.get(extent.offset) == extent.capacity

    def round_up(self, num_places: int) -> int:
        """The capacity an extent for ``num_places`` gets."""
        return -(-num_places // self.granule) * self.granule

    def allocate(self, num_places: int) -> Extent | None:
        """The smallest free run that holds ``num_places``, the lowest of equals; None if there is none."""
        if num_places < 1:
            raise ValueError(f"an extent of {num_places} places was asked for")
        capacity = self.round_up(num_places)
        index = bisect_left(self._free_by_size, (capacity, 0))
        if index == len(self._free_by_size):
            return None
        _, start = self._free_by_size[index]
        return self._take(start, capacity)

    def free(self, extent: Extent) -> None:
        """Give a live extent back. Raises ValueError if it is not live, so that nothing is freed twice."""
        if not self.is_live(extent):
            raise ValueError(f"{extent} is not allocated")
        del self._capacity_at[extent.offset]
        start, end = extent.offset, extent.offset + extent.capacity
        if end in self._free_by_start:
            end += self._remove(end)
        if start in self._free_by_end:
            start -= self._remove(self._free_by_end[start])
        self._insert(start, end - start)

    def extend(self, extent: Extent, num_places: int) -> Extent | None:
        """The same extent with room for ``num_places``, more than before, if what follows it is free; else None."""
        end = extent.offset + extent.capacity
        num_missing = self.round_up(num_places) - extent.capacity
        if self._free_by_start.get(end, 0) < num_missing:
            return None
        self._take(end, num_missing)
        del self._capacity_at[end]
        self._capacity_at[extent.offset] = extent.capacity + num_missing
        return Extent(extent.offset, extent.capacity + num_missing)

    def shrink(self, extent: Extent, num_places: int) -> Extent:
        """The same extent with room for ``num_places``, fewer than before; what follows them is free."""
        capacity = self.round_up(num_places)
        end = extent.offset + extent.capacity
        self._capacity_at[extent.offset] = capacity
        if end in self._free_by_start:
            end += self._remove(end)
        self._insert(extent.offset + capacity, end - extent.offset - capacity)
        return Extent(extent.offset, capacity)

    def gather(self, num_places: int) -> dict[int, Extent]:
        """Slide extents down until one free run holds ``num_places``: new extents by old offset, content to be copied.

        Slides where the fewest places move. Old and new extents overlap. Raises ValueError if fewer are free.
        """
        capacity = self.round_up(num_places)
        if capacity > self.num_free:
            raise ValueError(f"{capacity} places cannot be gathered of {self.num_free} free ones")
        place, end = self._cheapest_window(capacity)
        moved: dict[int, Extent] = {}
        target = place
        while place < end:
            if place in self._free_by_start:
                place += self._remove(place)
                continue
            size = self._capacity_at.pop(place)
            moved[place] = Extent(target, size)
            place, target = place + size, target + size
        self._capacity_at.update((extent.offset, extent.capacity) for extent in moved.values())
        self._insert(target, end - target)
        return moved

    def check(self) -> None:
        """Assert that live extents and free runs tile the arena, free runs joined and indexed alike. For tests."""
        runs = [(start, size, True) for start, size in self._free_by_start.items()]
        runs += [(start, size, False) for start, size in self._capacity_at.items()]
        expected_start, after_free = 0, False
        for start, size, is_free in sorted(runs):
            assert start == expected_start, f"hole or overlap at place {min(start, expected_start)}"
            assert size > 0
            assert size % self.granule == 0, f"run of {size} places at {start}"
            assert not (is_free and after_free), f"free runs not joined at {start}"
            expected_start, after_free = start + size, is_free
        assert expected_start == self.num_places
        assert self._free_by_size == sorted((size, start) for start, size in self._free_by_start.items())
        assert self._free_by_end == {start + size: start for start, size in self._free_by_start.items()}
        assert self.num_free == sum(self._free_by_start.values())

    def _cheapest_window(self, capacity: int) -> tuple[int, int]:
        """From the start of a free run to the end of one: ``capacity`` free places in it and the fewest live ones."""
        runs = sorted(self._free_by_start.items())
        fewest, window = self.num_places + 1, (0, 0)
        num_free = first = 0
        for start, size in runs:
            num_free += size
            while num_free - runs[first][1] >= capacity:
                num_free -= runs[first][1]
                first += 1
            if num_free >= capacity:
                begin, end = runs[first][0], start + size
                if end - begin - num_free < fewest:
                    fewest, window = end - begin - num_free, (begin, end)
        return window

    def _take(self, start: int, capacity: int) -> Extent:
        """The first ``capacity`` places of the free run at ``start``."""
        size = self._remove(start)
        if size > capacity:
            self._insert(start + capacity, size - capacity)
        self._capacity_at[start] = capacity
        return Extent(start, capacity)

    def _insert(self, start: int, size: int) -> None:
        insort(self._free_by_size, (size, start))
        self._free_by_start[start] = size
        self._free_by_end[start + size] = start
        self.num_free += size

    def _remove(self, start: int) -> int:
        size = self._free_by_start.pop(start)
        del self._free_by_end[start + size]
        del self._free_by_size[bisect_left(self._free_by_size, (size, start))]
        self.num_free -= size
        return size
