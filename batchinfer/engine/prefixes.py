"""Which waiting rows begin with the same tokens, found by comparing the tokens themselves.

A *stem* is a run of tokens that waiting rows begin with: a path of whole blocks in a tree of token blocks, or, for
the samples of one prompt (a *family*), all of the prompt but its last token. That last token is never shared: its
logits give the row's first new token. Blocks are compared as they are, not by a hash: a collision would silently
hand a row another row's KV.

A row descends only as far as another row came before it; the first row on a branch *lodges* where it branches off and
moves one block down when the next row arrives. So ten thousand unrelated prompts cost one block each, whatever their
length, and equal ones their length once.
"""

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Stem:
    """``length`` tokens that ``num_waiting`` waiting rows begin with; ``holder`` is the prefix that holds their KV."""

    length: int
    num_waiting: int = 0
    holder: int | None = None
    _parent: "Stem | None" = None
    _key: Hashable = None
    _children: dict[Hashable, "Stem"] = field(default_factory=dict)
    _lodger: "_Entry | None" = None


@dataclass(slots=True, eq=False)
class _Entry:
    """A waiting row: the deepest stem it is counted in, and its family's stem."""

    prompt: SequenceOf[int]
    num_blocks: int
    family_stem: Stem
    stem: Stem


class PrefixIndex:
    """The waiting rows by what they begin with.

    A stem is worth a prefix of its own from ``min_tokens`` tokens and ``min_rows`` waiting rows on; two rows are
    enough for a family.
    """

    def __init__(self, block_tokens: int, min_tokens: int, min_rows: int) -> None:
        self._block_tokens = block_tokens
        self._min_tokens = min_tokens
        self._min_rows = max(2, min_rows)
        self._entries: dict[int, _Entry] = {}
        self._root = Stem(0)
        self._families = Stem(0)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sequence: int, prompt: SequenceOf[int], family: Hashable) -> None:
        """A row waits. Rows of one ``family`` have one prompt; the prompt must not change while it waits."""
        family_stem = self._child(self._families, family, len(prompt) - 1)
        family_stem.num_waiting += 1
        entry = _Entry(prompt, max(0, len(prompt) - 1) // self._block_tokens, family_stem, self._root)
        self._entries[sequence] = entry
        self._root.num_waiting += 1
        while self._sink(entry):
            pass

    def remove(self, sequence: int) -> None:
        """It waits no more. Raises KeyError if it did not."""
        entry = self._entries.pop(sequence)
        if entry.stem._lodger is entry:
            entry.stem._lodger = None
        for stem in (*self._path(entry), self._root, entry.family_stem):
            stem.num_waiting -= 1
        self._prune(entry.stem)
        self._prune(entry.family_stem)

    def best(self, sequence: int) -> Stem | None:
        """The stem that saves most of this waiting row's prefill; None if none is worth it.

        n rows that share L tokens compute them once, so each saves L (n - 1) / n; where a prefix holds them
        already, a row saves all L.
        """
        entry = self._entries[sequence]
        best, most_saved = None, 0.0
        for stem in (entry.family_stem, *self._path(entry)):
            min_rows = 2 if stem is entry.family_stem else self._min_rows
            if stem.holder is not None:
                saved = float(stem.length)
            elif stem.length >= self._min_tokens and stem.num_waiting >= min_rows:
                saved = stem.length * (stem.num_waiting - 1) / stem.num_waiting
            else:
                continue
            if saved > most_saved:
                best, most_saved = stem, saved
        return best

    def hold(self, stem: Stem, holder: int) -> None:
        """``holder`` holds the stem's tokens from now on: the stem stays, also when no row waits for it."""
        stem.holder = holder

    def vacate(self, stem: Stem) -> None:
        """Nobody holds the stem's tokens any more."""
        stem.holder = None
        self._prune(stem)

    def check(self) -> None:
        """Assert that every count is what the rows in the index make it, and that nothing else is kept. For tests."""
        counts: dict[int, int] = {}
        for entry in self._entries.values():
            for stem in (*self._path(entry), entry.family_stem):
                counts[id(stem)] = counts.get(id(stem), 0) + 1
        assert self._root.num_waiting == len(self._entries)
        unseen = [*self._root._children.values(), *self._families._children.values()]
        while unseen:
            stem = unseen.pop()
            unseen += stem._children.values()
            assert stem.num_waiting == counts.pop(id(stem), 0)
            assert stem.num_waiting or stem.holder is not None or stem._children, "a stem that nobody needs is kept"
            assert stem._lodger is None or (stem._lodger.stem is stem and stem.num_waiting == 1)
        for entry in self._entries.values():
            is_at_end = entry.stem.length // self._block_tokens == entry.num_blocks
            assert is_at_end or entry.stem._lodger is entry, "a row stopped above others that it shares more with"
        assert not counts

    def _sink(self, entry: _Entry) -> bool:
        """One step of a row's way down; False when it has arrived."""
        stem = entry.stem
        if stem is not self._root and stem.num_waiting == 1 and not stem._children:
            stem._lodger = entry
            return False
        lodger, stem._lodger = stem._lodger, None
        if lodger is not None:
            self._descend(lodger)
            if lodger.stem is not stem:
                lodger.stem._lodger = lodger
        return self._descend(entry)

    def _descend(self, entry: _Entry) -> bool:
        """Count a row one block deeper; False if its blocks end here."""
        size = self._block_tokens
        depth = entry.stem.length // size
        if depth == entry.num_blocks:
            return False
        block = tuple(entry.prompt[depth * size : (depth + 1) * size])
        entry.stem = self._child(entry.stem, block, (depth + 1) * size)
        entry.stem.num_waiting += 1
        return True

    def _child(self, parent: Stem, key: Hashable, length: int) -> Stem:
        child = parent._children.get(key)
        if child is None:
            child = parent._children[key] = Stem(length, _parent=parent, _key=key)
        return child

    def _path(self, entry: _Entry) -> Iterator[Stem]:
        """The row's stems, the longest first, without the root."""
        stem = entry.stem
        while stem._parent is not None:
            yield stem
            stem = stem._parent

    def _prune(self, stem: Stem) -> None:
        while stem._parent is not None and not stem.num_waiting and stem.holder is None and not stem._children:
            del stem._parent._children[stem._key]
            stem = stem._parent
