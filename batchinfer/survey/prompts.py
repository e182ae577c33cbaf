"""The prompts of a job, or a sample of them, counted by worker processes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import groupby, islice

from batchinfer.devices import num_cores
from batchinfer.records import Shard, WorkUnit
from batchinfer.survey.counts import Example, PromptCounts, RangeCounts
from batchinfer.survey.duplicates import Duplicates
from batchinfer.survey.pool import worker_pool
from batchinfer.survey.windows import sample_windows, tasks_of
from batchinfer.survey.worker import MAX_SKIPPED_BYTES, Task, WorkerSetup, count, start_worker

#: Rows tokenised unless the user says otherwise: a second or two, and shares down to a percent.
SAMPLE_ROWS = 2048
#: Rows that make another worker worth its start (a second of importing).
_ROWS_PER_WORKER = 1024
_PERCENTILES = (50, 90, 99)
_KILLED = (
    "a process that tokenised rows was killed (out of memory, perhaps); run plan again, with a smaller --sample or "
    "without --full"
)

#: Called with the rows done and the rows to do.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PromptSurvey:
    """What was found in the rows that are left to generate: in all of them, or in a sample to be projected."""

    #: Rows left, and those of them that were looked at.
    num_rows: int
    num_rows_seen: int
    num_ranges: int
    num_shards_seen: int
    #: Prompt tokens -> rows that have so many, of those seen.
    lengths: Mapping[int, int]
    #: Tokens to read for the rows seen; later turns of a conversation count as long as the first.
    num_tokens_to_read: int
    num_completions: int
    #: New tokens for all of them, at most.
    max_new_tokens: int
    #: Whether they are what is going to be computed, not a limit: every completion is a choice among given ones.
    new_tokens_are_exact: bool
    #: How far the mean length may be off, for 19 samples of 20; None where all rows were seen.
    mean_length_error: float | None
    #: Shard path -> error type -> rows seen.
    dead_letters: Mapping[str, Mapping[str, int]]
    examples: Mapping[str, Sequence[Example]]
    duplicates: Duplicates

    @property
    def is_full(self) -> bool:
        return self.num_rows_seen >= self.num_rows

    @property
    def num_prompts(self) -> int:
        """Rows seen that have a prompt."""
        return sum(self.lengths.values())

    @property
    def num_tokens(self) -> int:
        """Prompt tokens seen."""
        return sum(length * num_rows for length, num_rows in self.lengths.items())

    @property
    def mean_length(self) -> float:
        return self.num_tokens / self.num_prompts if self.lengths else 0.0

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def scale(self) -> float:
        """From what was seen to all rows that are left."""
        return self.num_rows / self.num_rows_seen if self.num_rows_seen else 0.0

    def percentiles(self) -> dict[int, int]:
        """Percent -> the least length that so many of the prompts do not pass."""
        found = {}
        for percent in _PERCENTILES:
            left = math.ceil(self.num_prompts * percent / 100)
            for length in sorted(self.lengths):
                left -= self.lengths[length]
                if left <= 0:
                    found[percent] = length
                    break
        return found

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, prompts) of lengths between powers of two, from the first that has one to the last."""
        bins: Counter[int] = Counter()
        for length, num_rows in self.lengths.items():
            bins[max(4, (length - 1).bit_length())] += num_rows
        if not bins:
            return []
        return [
            (2 ** (bits - 1) + 1 if bits > 4 else 1, 2**bits, bins[bits]) for bits in range(min(bins), max(bins) + 1)
        ]

    def dead_letters_by_type(self) -> dict[str, int]:
        """Error type -> rows seen."""
        total: Counter[str] = Counter()
        for by_type in self.dead_letters.values():
            total.update(by_type)
        return dict(total)

    def as_json(self) -> dict[str, object]:
        """For ``--json``: what was seen, and the projection to all rows that are left."""
        duplicates, scale = self.duplicates, self.scale
        return {
            "scope": "rows left to generate",
            "is_full": self.is_full,
            "num_rows": self.num_rows,
            "num_rows_seen": self.num_rows_seen,
            "num_ranges_seen": self.num_ranges,
            "num_shards_seen": self.num_shards_seen,
            "prompt_tokens": {
                "mean": round(self.mean_length, 2),
                "mean_error_95": None if self.mean_length_error is None else round(self.mean_length_error, 2),
                "longest": self.longest,
                "percentiles": {str(percent): length for percent, length in self.percentiles().items()},
                "histogram": [
                    {"from": shortest, "to": longest, "num_prompts": number}
                    for shortest, longest, number in self.histogram()
                ],
                "total_estimate": round(self.num_tokens_to_read * scale),
            },
            "num_completions_estimate": round(self.num_completions * scale),
            "max_new_tokens_estimate": round(self.max_new_tokens * scale),
            "new_tokens_are_exact": self.new_tokens_are_exact,
            "dead_letters": {
                error_type: {
                    "num_rows_seen": number,
                    "num_rows_estimate": round(number * scale),
                    "examples": [{"row_id": it.row_id, "error": it.error} for it in self.examples.get(error_type, ())],
                }
                for error_type, number in sorted(self.dead_letters_by_type().items())
            },
            "dead_letters_by_shard": {path: dict(by_type) for path, by_type in sorted(self.dead_letters.items())},
            "duplicates": {
                "num_prompts_seen": duplicates.num_rows,
                "num_duplicates": duplicates.num_duplicates,
                "num_greedy_duplicates": duplicates.num_greedy_duplicates,
                "num_duplicate_prompt_tokens": duplicates.num_duplicate_tokens,
                "is_estimate": duplicates.is_estimate,
                "is_lower_bound": not self.is_full,
            },
        }


def survey_prompts(
    setup: WorkerSetup,
    shards: Sequence[Shard],
    units: Sequence[WorkUnit],
    *,
    num_rows: int | None = SAMPLE_ROWS,
    num_workers: int | None = None,
    on_progress: OnProgress = lambda num_done, num_rows: None,
) -> PromptSurvey:
    """Tokenise ``num_rows`` of the units' rows (None = all) in worker processes and count what they hold.

    Needs memory for the tasks in flight, one count per distinct length and the hashes of :mod:`duplicates`, however
    many rows there are. Raises JobError for a job that no replica could prepare either, StorageUnavailable, and
    RunInterrupted when a worker is killed.
    """
    total = sum(unit.num_rows for unit in units)
    is_sample = num_rows is not None and num_rows < total
    ranges = sample_windows(units, num_rows) if is_sample and num_rows is not None else tuple(units)
    planned = sum(each.num_rows for each in ranges)
    by_id = {shard.shard_id: shard for shard in shards}
    counts = PromptCounts()

    def tasks() -> Iterator[Task]:
        for task in tasks_of(ranges, is_sample=is_sample):
            used = _used(task, by_id)
            share = sum(each.num_rows for each in task) / planned
            yield Task(task, used, MAX_SKIPPED_BYTES * share if is_sample else None)

    workers = num_workers or max(1, min(num_cores(), -(-planned // _ROWS_PER_WORKER)))
    if planned:
        with worker_pool(workers, start_worker, setup, _KILLED) as pool:
            waiting: set[Future[RangeCounts]] = set()
            todo = tasks()
            while True:
                # Two tasks each: one at work, one behind it; results and tasks of a million units are never all here.
                waiting |= {pool.submit(count, task) for task in islice(todo, 2 * workers - len(waiting))}
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    counts.add(future.result(), keeps_ranges=is_sample)
                on_progress(counts.num_rows, planned)
    return _survey(counts, by_id, ranges, total, is_sample=is_sample)


def task_of(windows: Sequence[WorkUnit], shards: Sequence[Shard]) -> Task:
    """A whole sample as one task."""
    return Task(tuple(windows), _used(windows, {shard.shard_id: shard for shard in shards}), MAX_SKIPPED_BYTES)


def _used(task: Sequence[WorkUnit], by_id: Mapping[str, Shard]) -> tuple[Shard, ...]:
    """The task's shards, each with what reading the task's rows needs of its lines."""
    used = []
    for shard_id, members in groupby(task, key=lambda each: each.shard_id):
        inside = list(members)
        first_row, end = inside[0].first_row, inside[-1].first_row + inside[-1].num_rows
        used.append(by_id[shard_id].for_unit(WorkUnit(shard_id, first_row, end - first_row)))
    return tuple(used)


def _survey(
    counts: PromptCounts, by_id: Mapping[str, Shard], ranges: Sequence[WorkUnit], total: int, *, is_sample: bool
) -> PromptSurvey:
    return PromptSurvey(
        num_rows=total,
        num_rows_seen=counts.num_rows,
        num_ranges=len(ranges),
        num_shards_seen=len({each.shard_id for each in ranges}),
        lengths=dict(sorted(counts.lengths.items())),
        num_tokens_to_read=counts.num_prompt_tokens,
        num_completions=counts.num_completions,
        max_new_tokens=counts.max_new_tokens,
        new_tokens_are_exact=counts.num_chosen == counts.num_completions > 0,
        mean_length_error=error_of_mean(counts.by_range) if is_sample else None,
        dead_letters={by_id[shard_id].path: dict(by_type) for shard_id, by_type in counts.dead_letters.items()},
        examples=counts.examples,
        duplicates=counts.duplicates.result(),
    )


def error_of_mean(by_range: Sequence[tuple[int, int]]) -> float | None:
    """Twice the standard error of a mean length taken over ranges of (prompts, tokens); None for fewer than two.

    Neighbouring rows are alike, so that it is the ranges that count as independent, not their rows.
    """
    used = [(prompts, tokens) for prompts, tokens in by_range if prompts]
    num_prompts = sum(prompts for prompts, _ in used)
    if len(used) < 2:
        return None
    mean = sum(tokens for _, tokens in used) / num_prompts
    squares = sum((tokens - mean * prompts) ** 2 for prompts, tokens in used)
    return 2 * math.sqrt(squares * len(used) / (len(used) - 1)) / num_prompts
