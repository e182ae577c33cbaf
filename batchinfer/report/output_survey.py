"""What the parts of an output say about its rows: lengths, finish reasons, dead letters by cause with examples.

Of many parts an evenly spread sample is read; the report says of how many.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.records import FINISH_REASON, NUM_COMPLETION_TOKENS, NUM_PROMPT_TOKENS, ROW_ID
from batchinfer.storage.layout import completions_part, errors_part
from batchinfer.storage.location import Location

__all__ = ["DeadLetterCause", "Histogram", "OutputSurvey", "survey"]

#: Parts of each kind that are read; three columns of each completions part.
MAX_PARTS = 256
NUM_EXAMPLES = 3
_THREADS = 8
#: Upper ends of the length bars: powers of two, so that short and long rows show in one chart.
_ENDS = tuple(1 << power for power in range(3, 21))
_EXAMPLE_CHARACTERS = 300


@dataclass(slots=True)
class Histogram:
    """Counts per bar; bar k holds lengths above ``ends[k - 1]`` and up to ``ends[k]``."""

    counts: Counter[int] = field(default_factory=Counter)
    num_values: int = 0
    total: int = 0
    longest: int = 0

    def add(self, values: "np.ndarray[Any, Any]") -> None:
        bars, counts = np.unique(np.searchsorted(_ENDS, values).clip(max=len(_ENDS) - 1), return_counts=True)
        self.counts.update({_ENDS[bar]: count for bar, count in zip(bars.tolist(), counts.tolist(), strict=True)})
        self.num_values += len(values)
        self.total += int(values.sum())
        self.longest = max(self.longest, int(values.max(initial=0)))

    @property
    def mean(self) -> float:
        return self.total / self.num_values if self.num_values else 0.0

    def bars(self) -> list[tuple[int, int]]:
        """(upper end, count) from the first bar with a count to the last one."""
        if not self.counts:
            return []
        first, last = min(self.counts), max(self.counts)
        return [(end, self.counts[end]) for end in _ENDS if first <= end <= last]


@dataclass(slots=True)
class DeadLetterCause:
    """One ``error_type``: how many rows, and the first few of them as (row id, error)."""

    error_type: str
    num_rows: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class OutputSurvey:
    """Counts over the parts that were read."""

    num_parts: int = 0
    num_parts_read: int = 0
    num_error_parts: int = 0
    num_error_parts_read: int = 0
    prompt_tokens: Histogram = field(default_factory=Histogram)
    completion_tokens: Histogram = field(default_factory=Histogram)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    dead_letters: dict[str, DeadLetterCause] = field(default_factory=dict)
    #: Parts that could not be read; ``verify`` says what is wrong with them.
    num_unreadable: int = 0


def survey(output: Location, unit_ids: Sequence[str], with_dead_letters: Sequence[str]) -> OutputSurvey:
    """Read parts of these committed units, and errors parts of those ``with_dead_letters``.

    Raises StorageUnavailable when the storage does not answer. A damaged part is counted and left out.
    """
    found = OutputSurvey(num_parts=len(unit_ids), num_error_parts=len(with_dead_letters))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="survey") as pool:
        columns = [NUM_PROMPT_TOKENS, NUM_COMPLETION_TOKENS, FINISH_REASON]
        places = [completions_part(output, unit_id) for unit_id in _spread(unit_ids)]
        for table in pool.map(lambda place: _read(place, columns), places):
            if table is None:
                found.num_unreadable += 1
                continue
            found.num_parts_read += 1
            found.prompt_tokens.add(table.column(NUM_PROMPT_TOKENS).to_numpy())
            found.completion_tokens.add(table.column(NUM_COMPLETION_TOKENS).to_numpy())
            found.finish_reasons.update(str(reason) for reason in table.column(FINISH_REASON).to_pylist())
        places = [errors_part(output, unit_id) for unit_id in _spread(with_dead_letters)]
        for table in pool.map(lambda place: _read(place, [ROW_ID, "error_type", "error"]), places):
            if table is None:
                found.num_unreadable += 1
                continue
            found.num_error_parts_read += 1
            for row in table.to_pylist():
                _add_dead_letter(found, row)
    return found


def _add_dead_letter(found: OutputSurvey, row: dict[str, str]) -> None:
    cause = found.dead_letters.setdefault(row["error_type"], DeadLetterCause(row["error_type"]))
    cause.num_rows += 1
    if len(cause.examples) < NUM_EXAMPLES:
        cause.examples.append((row[ROW_ID], (row["error"] or "")[:_EXAMPLE_CHARACTERS]))


def _spread(unit_ids: Sequence[str]) -> list[str]:
    """At most ``MAX_PARTS`` of them at equal distances."""
    if len(unit_ids) <= MAX_PARTS:
        return list(unit_ids)
    return [unit_ids[index * len(unit_ids) // MAX_PARTS] for index in range(MAX_PARTS)]


def _read(place: Location, columns: list[str]) -> pa.Table | None:
    try:
        return pq.read_table(pa.BufferReader(place.read_bytes()), columns=columns)
    except (pa.ArrowException, OSError):
        return None
