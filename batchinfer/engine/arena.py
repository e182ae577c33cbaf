"""Who lives where in the KV arena: places for holders, and the copies it takes when holders move.

Contiguous extents would leave holes that nobody fits in. So whoever must have places gets them as long as enough
are free anywhere: other holders slide together. Copies are cheap beside a step, a recomputed sequence is not.
"""

from batchinfer.engine.extents import Extents
from batchinfer.engine.holders import NO_EXTENT, Kept, Prefix, Row
from batchinfer.engine.step_plan import Copy, Extent

#: What is read or written in a step; and what may own places beside it.
Reader = Prefix | Row
Holder = Reader | Kept


class Arena:
    """Extents of live holders. Within one plan all moves come before anything that names a place."""

    def __init__(self, num_places: int, granule: int) -> None:
        self._extents = Extents(num_places, granule)
        self._holders: dict[int, Holder] = {}
        self._moved: dict[int, tuple[Holder, int]] = {}

    @property
    def num_places(self) -> int:
        return self._extents.num_places

    @property
    def num_used(self) -> int:
        return self._extents.num_used

    @property
    def num_free(self) -> int:
        return self._extents.num_free

    def round_up(self, num_places: int) -> int:
        """The capacity an extent for ``num_places`` gets."""
        return self._extents.round_up(num_places)

    def can_grow(self, holder: Holder, num_places: int) -> bool:
        return self.round_up(num_places) <= self.num_free + holder.extent.capacity

    def settle(self, holder: Holder, num_places: int) -> None:
        """Places for a holder that has none. Raises ValueError if fewer are free."""
        holder.settle(self._allocate(num_places))
        self._holders[holder.holder] = holder

    def grow(self, holder: Holder, num_places: int) -> None:
        """More places, here or elsewhere. Raises ValueError unless ``can_grow``."""
        if not self.can_grow(holder, num_places):
            raise ValueError(f"holder {holder.holder} cannot grow to {num_places} places, {self.num_free} are free")
        grown = self._extents.extend(holder.extent, num_places)
        if grown is None:
            self._note_move(holder)
            grown = self._extents.allocate(num_places)
            self._extents.free(holder.extent)
            # Where the holder stands is up for the others to slide into.
            del self._holders[holder.holder]
            grown = grown or self._allocate(num_places)
            self._holders[holder.holder] = holder
        holder.settle(grown)

    def shrink(self, holder: Holder, num_places: int) -> None:
        """Give back what it has beyond ``num_places``, which hold all its KV; nothing happens if that is nothing."""
        if self.round_up(num_places) < holder.extent.capacity:
            holder.settle(self._extents.shrink(holder.extent, num_places))

    def pass_on(self, holder: Holder, heir: Holder) -> None:
        """``heir``, which has no places, gets those of ``holder``, and the KV in them."""
        del self._holders[holder.holder]
        self._holders[heir.holder] = heir
        moved = self._moved.pop(holder.holder, None)
        if moved is not None:
            self._moved[heir.holder] = (heir, moved[1])
        heir.settle(holder.extent)
        holder.settle(NO_EXTENT)

    def release(self, holder: Holder) -> None:
        """Its places may be used by whatever comes after the last plan."""
        self._extents.free(holder.extent)
        del self._holders[holder.holder]
        holder.settle(NO_EXTENT)

    def take_copies(self) -> tuple[Copy, ...]:
        """What must be copied since the last call, from where it lay then to where it lies now."""
        copies = tuple(
            Copy(source, holder.extent.offset, holder.num_held)
            for holder, source in self._moved.values()
            if holder.extent is not NO_EXTENT and holder.extent.offset != source and holder.num_held
        )
        self._moved.clear()
        return copies

    def check(self) -> None:
        """Assert that every place belongs to one holder or to none. For tests."""
        self._extents.check()
        extents = [holder.extent for holder in self._holders.values()]
        assert all(number == holder.holder for number, holder in self._holders.items())
        assert len({extent.offset for extent in extents}) == len(extents)
        assert self.num_used == sum(extent.capacity for extent in extents)
        assert all(self._extents.is_live(extent) for extent in extents)

    def _allocate(self, num_places: int) -> Extent:
        extent = self._extents.allocate(num_places)
        if extent is not None:
            return extent
        at_offset = {holder.extent.offset: holder for holder in self._holders.values()}
        for offset, moved in self._extents.gather(num_places).items():
            self._note_move(at_offset[offset])
            at_offset[offset].settle(moved)
        extent = self._extents.allocate(num_places)
        assert extent is not None
        return extent

    def _note_move(self, holder: Holder) -> None:
        """Where its KV was when the last copies were taken: it may move again, or go, before they are taken next."""
        self._moved.setdefault(holder.holder, (holder, holder.extent.offset))
