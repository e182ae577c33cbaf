"""The dead letters of an output: how many there are, and whether the errors parts tell of exactly those.

The completions part alone decides which rows of a committed unit are dead letters, and its label says how many and
which. Only units that have an errors part are looked at: a commit with dead letters is always behind one, and
100,000 parts are not opened to find out what one listing says.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from batchinfer.storage.checksums import read_label
from batchinfer.storage.layout import COMPLETIONS, ERRORS
from batchinfer.storage.location import FoundFile, Location
from batchinfer.storage.part_tables import DeadRows

Item = TypeVar("Item")
Found = TypeVar("Found")

log = logging.getLogger(__name__)

_THREADS = 16
#: Items that one thread takes at once.
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """What completions and errors parts say of an output's committed units."""

    #: Units with dead letters and how many each has.
    num_by_unit: Mapping[str, int]
    #: Units whose errors part does not tell of exactly those rows: reasons of an attempt that did not commit, or
    #: of rows that a retry has generated since, or a damaged file. To be fitted to the commit anew.
    unfit: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.num_by_unit.values())

    def of(self, unit_ids: Iterable[str]) -> int:
        """How many of these units' rows are dead letters."""
        return sum(self.num_by_unit.get(unit_id, 0) for unit_id in unit_ids)


def look_at_dead_letters(
    output: Location, completions: Mapping[str, FoundFile], errors: Mapping[str, FoundFile]
) -> DeadLetters:
    """Read the labels of units that have both parts, in parallel; the arguments are listings by unit id.

    Nothing that is damaged stops it: a damaged errors part is unfit, and a damaged completions part is left to
    ``verify``. Raises StorageUnavailable when the storage does not answer.
    """
    units = [unit_id for unit_id in errors if unit_id in completions]
    roots = output.child(COMPLETIONS), output.child(ERRORS)

    def look(unit_id: str) -> tuple[int, bool]:
        committed = dead_rows_of(roots[0], completions[unit_id])
        if committed is None:
            log.warning("%s: %s is damaged; run `batchinfer verify`", roots[0], completions[unit_id].name)
            return 0, True
        return committed.number, errors_fit(committed, dead_rows_of(roots[1], errors[unit_id]))

    found = dict(zip(units, in_parallel(look, units), strict=True))
    return DeadLetters(
        {unit_id: number for unit_id, (number, _) in found.items() if number},
        tuple(unit_id for unit_id, (_, fits) in found.items() if not fits),
    )


def errors_fit(committed: DeadRows, reasons: DeadRows | None) -> bool:
    """Whether an errors part tells of exactly the rows that its unit's completions part lacks; None = damaged."""
    return committed.number > 0 and reasons == committed


def dead_letters_of_every_unit(output: Location, completions: Mapping[str, FoundFile]) -> dict[str, int]:
    """Units with dead letters and how many each has, from the labels of all completions parts.

    Also finds those whose errors part somebody deleted. One read per unit: for what happens rarely.
    """
    root = output.child(COMPLETIONS)
    found = in_parallel(lambda file: dead_rows_of(root, file), list(completions.values()))
    counts = zip(completions, found, strict=True)
    return {unit_id: dead_rows.number for unit_id, dead_rows in counts if dead_rows is not None and dead_rows.number}


def dead_rows_of(directory: Location, file: FoundFile) -> DeadRows | None:
    """What a part's label says; None when it cannot be read."""
    label = read_label(directory.child(file.name), file.size_bytes)
    return DeadRows.from_label(label) if label is not None else None


def in_parallel(look: Callable[[Item], Found], items: list[Item]) -> list[Found]:
    """``look`` at each item, many at a time: each is a small read. In the items' order."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="footer") as pool:
        return [found for chunk in pool.map(lambda chunk: [look(item) for item in chunk], chunks) for found in chunk]
