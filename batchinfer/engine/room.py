"""Places for the scheduler's rows: what may start, what grows, what is kept, and who gives up places for whom.

``Scheduler`` says whose turn it is; here is said whether there is room for it, and everything that owns KV is joined:
the arena, shared prefixes, kept KV, and the forecast of what the running rows will need.

Kept KV (``kept_kv``) counts as free: it holds nobody up, in no decision, and is the first to go when its places are
needed. Prefixes that nobody uses are the next. What running rows hold is the scheduler's to take back.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from batchinfer.engine.arena import Arena
from batchinfer.engine.forecast import Forecast, OutputLengths
from batchinfer.engine.holders import NO_EXTENT, Kept, Prefix, Row
from batchinfer.engine.kept_kv import KeptKv
from batchinfer.engine.prefixes import PrefixIndex
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.shared_prefixes import SharedPrefixes
from batchinfer.engine.step_plan import Copy


class Room:
    """The places of one arena. ``holders`` gives numbers to shared prefixes."""

    def __init__(self, limits: Limits, holders: Iterator[int], lengths: OutputLengths) -> None:
        self._growth_tokens = limits.growth_tokens
        self._arena = Arena(limits.num_places, limits.granule)
        index = PrefixIndex(limits.prefix_block, limits.min_prefix_tokens, limits.min_prefix_rows)
        self.prefixes = SharedPrefixes(index, self._arena, holders)
        self.kept = KeptKv(self._arena, self.prefixes)
        self._forecast = Forecast(lengths)
        self._reserved = int(limits.reserve * self._arena.num_places)
        self._step = 0
        self.num_prefix_hits = 0
        self.num_kept_hits = 0
        self.num_kept_tokens = 0
        self.num_growths = 0
        self.num_copied_places = 0

    @property
    def num_places(self) -> int:
        return self._arena.num_places

    @property
    def num_used(self) -> int:
        """Places that rows, prefixes and kept KV own."""
        return self._arena.num_used

    def begin_step(self, step: int) -> None:
        """To be called for every step in turn, before anything else of it."""
        self._step = step
        self._forecast.advance(step)

    def take_copies(self) -> tuple[Copy, ...]:
        """What must be copied since the last call. Until the next step nothing may move any more."""
        copies = self._arena.take_copies()
        self.num_copied_places += sum(copy.num_tokens for copy in copies)
        return copies

    def observe(self, num_output_tokens: int) -> None:
        """A row ended by itself after so many tokens."""
        self._forecast.observe(num_output_tokens)

    def prefix_for(self, row: Row) -> Prefix | None:
        """The prefix that a waiting row is to share, made if it is missing and there is room for it."""
        stem = self.prefixes.best_stem(row)
        if stem is None:
            return None
        if stem.holder is not None:
            return self.prefixes[stem.holder]
        if not self._is_affordable(self._forecast.peak(), stem.length):
            return None
        self._make_room(stem.length)
        return self.prefixes.make(stem, row)

    def start(self, row: Row, prefix: Prefix | None, kept: Kept | None) -> bool:
        """Give a waiting row its extent, behind ``prefix`` or ``kept``; False if it is not expected to fit.

        Then it is as before. With nothing but prefixes in the arena a row always starts: beside its own prefix it has
        room for its full length (see ``SharedPrefixes.best_stem`` and ``KeptKv.claim``), and without one the scheduler
        refused it if it could not fit.
        """
        row.prefix = prefix if kept is None else kept.prefix
        num_places = row.own_places(self._growth_tokens)
        on_average = row.own_places(self._growth_tokens // 2)
        self._forecast.add(row.sequence, self._step, on_average, row.num_generated, row.max_tokens - row.num_tokens)
        while not (self._is_affordable(self._forecast.peak(), 0) and self._is_affordable(0, num_places)):
            # Unlike kept KV itself, a prefix counts as used, also one that nothing but kept KV stands on.
            if self.kept.evict_sole_user(kept):
                continue
            if not self._only_prefixes_are_held:
                self._forecast.remove(row.sequence)
                row.prefix = None
                return False
            num_places = row.own_places(1)
            break
        self._make_room(num_places, kept, prefix)
        self.prefixes.row_leaves(row)
        if kept is not None:
            self._go_on_behind(kept, row, num_places)
            return True
        if prefix is not None:
            self.prefixes.use(prefix)
            self.num_prefix_hits += 1
        self._arena.settle(row, num_places)
        row.num_prefilled = row.prefix_length
        return True

    def grow(self, row: Row) -> bool:
        """Room for a decoding row's newest token; False if nobody but running rows could give it up.

        With headroom if there are places for it, else as little as it takes.
        """
        while not self._grow(row):
            if not self.prefixes.evict():
                return False
        return True

    def leave(self, row: Row, *, keeps: bool = False) -> None:
        """Take a row's places and prefix back, or keep them for who continues it; may be repeated."""
        if row.extent is NO_EXTENT:
            return
        self._forecast.remove(row.sequence)
        if keeps and row.num_held > 0:
            self.kept.keep(row)
            return
        self._arena.release(row)
        prefix, row.prefix = row.prefix, None
        if prefix is not None:
            self.prefixes.leave(prefix)

    def check(self, rows: SequenceOf[Row]) -> None:
        """Assert that every place is accounted for, given all rows that the scheduler knows. For tests."""
        self._arena.check()
        self.kept.check()
        users = self.kept.users()
        for row in rows:
            if row.prefix is not None:
                assert self.prefixes[row.prefix.holder] is row.prefix
                assert row.extent is not NO_EXTENT
                users[row.prefix.holder] += 1
            assert row.extent is NO_EXTENT or row.room == row.prefix_length + row.extent.capacity
        self.prefixes.check(users)
        own_places = sum(row.extent.capacity for row in rows)
        assert self._arena.num_used == own_places + self.prefixes.num_places + self.kept.num_places

    def _grow(self, row: Row) -> bool:
        for num_more in (self._growth_tokens, 0):
            num_places = row.own_places(num_more)
            while not self._arena.can_grow(row, num_places):
                if not self.kept.evict():
                    break
            else:
                self._arena.grow(row, num_places)
                self.num_growths += 1
                return True
        return False

    def _is_affordable(self, expected_places: int, num_more: int) -> bool:
        """Whether ``num_more`` places can go now, and what the running rows are expected to need will fit then."""
        capacity = self._arena.round_up(num_more)
        num_used = self._arena.num_used - self.kept.num_places
        num_places = max(num_used, self.prefixes.num_places + expected_places) + capacity
        return num_places <= self._arena.num_places - self._reserved

    @property
    def _only_prefixes_are_held(self) -> bool:
        """No row owns places, and none is about to use a prefix still in prefill."""
        num_used = self._arena.num_used - self.kept.num_places
        return num_used == self.prefixes.num_places and not self.prefixes.in_prefill

    def _make_room(self, num_places: int, kept: Kept | None = None, prefix: Prefix | None = None) -> None:
        """Free what is to be settled, part of which ``kept`` has already, and touch neither ``kept`` nor ``prefix``."""
        num_own = 0 if kept is None else kept.extent.capacity
        while self._arena.round_up(num_places) > self._arena.num_free + num_own:
            found = self.kept.evict(kept) or self.prefixes.evict(kept=prefix)
            assert found, "what fits does not fit"

    def _go_on_behind(self, kept: Kept, row: Row, num_places: int) -> None:
        """The row takes over what is kept, and reads what is not."""
        self.kept.hand_over(kept, row)
        row.num_prefilled = kept.num_with_kv
        if self._arena.round_up(num_places) > row.extent.capacity:
            self._arena.grow(row, num_places)
        else:
            self._arena.shrink(row, num_places)
        self.num_kept_hits += 1
        self.num_kept_tokens += kept.num_with_kv
