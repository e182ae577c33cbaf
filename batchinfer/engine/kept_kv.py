"""KV of turns that have ended, kept in the arena until the next turn of their conversation is there to go on behind it.

It costs nobody anything: whoever needs its places gets them at once, and what was kept longest without being asked for
goes first. A turn whose KV is gone reads its whole prompt, as it would have without.
"""

from collections import Counter
from collections.abc import Sequence as SequenceOf

from batchinfer.engine.arena import Arena
from batchinfer.engine.holders import Kept, Row
from batchinfer.engine.shared_prefixes import SharedPrefixes


class KeptKv:
    """What is kept in ``arena``, by the number of the sequence it was left by."""

    def __init__(self, arena: Arena, prefixes: SharedPrefixes) -> None:
        self._arena = arena
        self._prefixes = prefixes
        #: In the order in which they go.
        self._kept: dict[int, Kept] = {}
        self.num_places = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, row: Row) -> None:
        """Take over the extent of a row at its end, and its use of a shared prefix."""
        kept = Kept(row.sequence, row.num_with_kv, row.prefix, row.turn)
        self._arena.pass_on(row, kept)
        row.prefix = None
        self._kept[kept.holder] = kept
        self.num_places += kept.extent.capacity

    def complete(self, sequence: int, token_ids: SequenceOf[int]) -> None:
        """The sequence has ended with these tokens, prompt and generated ones: now another one can claim its KV.

        Without any its KV goes; and nothing happens if it is gone already.
        """
        kept = self._kept.get(sequence)
        if not token_ids:
            self.drop(sequence)
        elif kept is not None:
            kept.token_ids = token_ids

    def claim(self, row: Row) -> Kept | None:
        """The KV of the sequence that a new row continues: what of it the row's prompt begins with is kept for it.

        At least one of its tokens a row must read itself. None, and nothing is kept any more, if there is nothing to go
        on behind, or if the shared prefix it stands on would not leave the row room for its full length.
        """
        kept = self.of(row)
        if kept is None:
            return None
        kept.num_with_kv = min(kept.num_with_kv, _num_common(kept.token_ids, row.prompt), row.num_tokens - 1)
        full_capacity = self._arena.round_up(kept.prefix_length) if kept.prefix_length else 0
        full_capacity += self._arena.round_up(row.max_tokens - 1 - kept.prefix_length)
        if kept.num_held <= 0 or full_capacity > self._arena.num_places:
            self.drop(kept.holder)
            return None
        # Asked for last, it goes last.
        self._kept[kept.holder] = self._kept.pop(kept.holder)
        return kept

    def of(self, row: Row) -> Kept | None:
        """What a waiting row can go on behind, if that is still there."""
        return None if row.continues is None else self._kept.get(row.continues)

    def hand_over(self, kept: Kept, row: Row) -> None:
        """The row owns the extent from now on, and uses the shared prefix in its place; ``row.prefix`` names it."""
        del self._kept[kept.holder]
        self.num_places -= kept.extent.capacity
        self._arena.pass_on(kept, row)

    def drop(self, sequence: int) -> None:
        """Nobody will ask for it any more; nothing happens if it is gone already."""
        kept = self._kept.pop(sequence, None)
        if kept is None:
            return
        self.num_places -= kept.extent.capacity
        self._arena.release(kept)
        prefix, kept.prefix = kept.prefix, None
        if prefix is not None:
            self._prefixes.leave(prefix)

    def evict(self, spared: Kept | None = None) -> bool:
        """Give the places of the one that goes next, but for ``spared``; False if there is none."""
        return self._evict(next((kept for kept in self._kept.values() if kept is not spared), None))

    def evict_sole_user(self, spared: Kept | None = None) -> bool:
        """The same among those that alone hold a shared prefix, which no row in the arena or in line would use."""
        num_kept = self.users()
        spared_prefix = None if spared is None else spared.prefix
        for kept in self._kept.values():
            prefix = kept.prefix
            if prefix is None or prefix is spared_prefix or prefix.stem.num_waiting:
                continue
            if prefix.num_users == num_kept[prefix.holder]:
                return self._evict(kept)
        return False

    def users(self) -> Counter[int]:
        """How many keep KV that stands on each shared prefix."""
        return Counter(kept.prefix.holder for kept in self._kept.values() if kept.prefix is not None)

    def check(self) -> None:
        """Assert that everything derived agrees with what is kept. For tests."""
        assert self.num_places == sum(kept.extent.capacity for kept in self._kept.values())
        for number, kept in self._kept.items():
            assert kept.holder == number
            assert 0 < kept.num_held <= kept.extent.capacity

    def _evict(self, kept: Kept | None) -> bool:
        if kept is None:
            return False
        self.num_evicted += 1
        self.drop(kept.holder)
        return True


def _num_common(left: SequenceOf[int], right: SequenceOf[int]) -> int:
    """With how many equal tokens both begin."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
