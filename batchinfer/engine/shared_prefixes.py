"""The life of shared prefixes: made when worth it, counted while used, kept while wanted, evicted for room."""

from collections.abc import Iterator

from batchinfer.engine.arena import Arena
from batchinfer.engine.holders import Phase, Prefix, Row
from batchinfer.engine.prefixes import PrefixIndex, Stem


class SharedPrefixes:
    """Prefixes that live in ``arena``, ``holders`` gives them their numbers."""

    def __init__(self, index: PrefixIndex, arena: Arena, holders: Iterator[int]) -> None:
        self._index = index
        self._arena = arena
        self._holders = holders
        self._prefixes: dict[int, Prefix] = {}
        self._unused: dict[int, Prefix] = {}
        self.num_places = 0
        self.num_made = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, holder: int) -> Prefix:
        """Raises KeyError if no prefix has this number (any more)."""
        return self._prefixes[holder]

    @property
    def in_prefill(self) -> list[Prefix]:
        """Those that no row can use yet, the oldest first. Nobody uses them, so they are among the unused."""
        return [prefix for prefix in self._unused.values() if not prefix.is_ready]

    def row_waits(self, row: Row) -> None:
        self._index.add(row.sequence, row.prompt, row.family)

    def row_leaves(self, row: Row) -> None:
        """It waits no more: admitted, finished or aborted."""
        self._index.remove(row.sequence)

    def best_stem(self, row: Row) -> Stem | None:
        """What this waiting row should share, if anything.

        A row shares only if the prefix leaves room for its full length with nothing else in the arena; rounding
        may be what breaks it.
        """
        stem = self._index.best(row.sequence) if row.may_share else None
        if stem is None:
            return None
        full_capacity = self._arena.round_up(stem.length) + self._arena.round_up(row.max_tokens - 1 - stem.length)
        return stem if full_capacity <= self._arena.num_places else None

    def advance(self) -> None:
        """To be called before each plan: what the plans so far have prefilled is ready."""
        for prefix in self.in_prefill:
            prefix.is_ready = prefix.num_prefilled == prefix.length
        self.drop_unwanted()

    def make(self, stem: Stem, founder: Row) -> Prefix:
        """A prefix for ``stem``, still to be prefilled from the founder's tokens. The places must be free."""
        prefix = Prefix(next(self._holders), founder, stem)
        self._arena.settle(prefix, stem.length)
        self._index.hold(stem, prefix.holder)
        self._prefixes[prefix.holder] = self._unused[prefix.holder] = prefix
        self.num_places += prefix.extent.capacity
        self.num_made += 1
        return prefix

    def use(self, prefix: Prefix) -> None:
        prefix.num_users += 1
        self._unused.pop(prefix.holder, None)

    def leave(self, prefix: Prefix) -> None:
        """One user less; the last one's prefix goes too, unless waiting rows would use it."""
        prefix.num_users -= 1
        if not prefix.num_users:
            self._unused[prefix.holder] = prefix
            self.drop_unwanted()

    def drop_unwanted(self) -> None:
        """Free what nobody uses or waits for, and prefixes whose tokens nobody can supply any more."""
        for prefix in tuple(self._unused.values()):
            if not prefix.is_wanted or (not prefix.is_ready and prefix.founder.phase is Phase.GONE):
                self._drop(prefix)

    def evict(self, *, kept: Prefix | None = None) -> bool:
        """Free the oldest unused prefix but ``kept``; False if there is none.

        The row it was made for, if it still waits, must not ask for another one: else memory that stays short
        would make and evict prefixes forever while that row waits.
        """
        prefix = next((prefix for prefix in self._unused.values() if prefix is not kept), None)
        if prefix is None:
            return False
        if prefix.founder.phase is Phase.WAITING:
            prefix.founder.may_share = False
        self._drop(prefix)
        return True

    def check(self, users: dict[int, int]) -> None:
        """Assert reference counts against ``users``, rows by prefix, and everything derived. For tests."""
        self._index.check()
        assert {number: prefix.num_users for number, prefix in self._prefixes.items() if prefix.num_users} == users
        assert self._unused == {number: prefix for number, prefix in self._prefixes.items() if not prefix.num_users}
        for number, prefix in self._prefixes.items():
            assert prefix.holder == number == prefix.stem.holder
            assert prefix.is_ready or prefix.founder.phase is not Phase.GONE
            assert prefix.extent.capacity == self._arena.round_up(prefix.length)
        assert self.num_places == sum(prefix.extent.capacity for prefix in self._prefixes.values())

    def _drop(self, prefix: Prefix) -> None:
        del self._prefixes[prefix.holder], self._unused[prefix.holder]
        self._index.vacate(prefix.stem)
        self.num_places -= prefix.extent.capacity
        self._arena.release(prefix)
