"""In a worker process: rows are read, rendered and tokenised as a replica does it, and counted.

The process is one of a pool, started anew (spawn), so that torch and transformers stay out of the command's own.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing.synchronize import Event
from pathlib import Path

import pyarrow as pa

from batchinfer import grammar_rules
from batchinfer.cluster.engine_loading import fake_vocabulary
from batchinfer.detokenise import Detokenizer
from batchinfer.errors import InputError, ShardCorrupt
from batchinfer.models.files import has_tokenizer, read_config, vocab_size
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.columns import required_columns
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Prompt, RowError, Shard, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.row_groups import read_row_groups
from batchinfer.storage.shard_reader import ShardReader
from batchinfer.survey.counts import RangeCounts, SamplingHashes
from batchinfer.survey.windows import within_reach

#: What a sample may decode beside its own rows, over all shards: some seconds on one core.
MAX_SKIPPED_BYTES = 1 << 30
#: Dead letter of a row behind the damage in a corrupt shard, as the unit pipeline names it.
_SHARD_CORRUPT = "shard_corrupt"


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to know of the job; ``schema`` has the columns that a replica reads."""

    spec: JobSpec
    directory: Path
    max_model_len: int
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class Task:
    """Row ranges to go through, in order, and their shards."""

    ranges: tuple[WorkUnit, ...]
    shards: tuple[Shard, ...]
    #: Bytes that may be decoded on the way to the ranges; None = they are whole units, read where they are.
    max_skipped_bytes: float | None

    @property
    def is_sample(self) -> bool:
        return self.max_skipped_bytes is not None


class Surveyor:
    """Renders and counts rows of one job.

    Raises what the parts of a replica raise for a job that is wrong, and StorageUnavailable when a shard cannot be
    reached.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        spec = setup.spec
        needs_tokenizer = spec.prompt.token_ids is None or has_tokenizer(setup.directory)
        tokenizer = load_tokenizer(setup.directory) if needs_tokenizer else None
        if spec.engine.kind == "fake":
            num_ids: int | None = fake_vocabulary(Detokenizer(tokenizer) if tokenizer is not None else None)[0]
        else:
            num_ids = vocab_size(read_config(setup.directory))
        self._renderer = PromptRenderer(
            spec.prompt,
            spec.sampling,
            tokenizer,
            max_model_len=setup.max_model_len,
            vocab_size=num_ids,
            check_grammar=grammar_rules.refuse if spec.engine.kind == "fake" else grammar_rules.problem,
        )
        needed = required_columns(spec.prompt)
        # A table without columns has no rows either: a prompt that reads none is read with all.
        self._narrow = pa.schema([field for field in setup.schema if field.name in needed]) if needed else setup.schema
        self._locate = partial(locate, storage_options=spec.input.storage_options, blames=InputError)
        # As a replica: a row is lost to damage in any column, and a line is refused for any value.
        self._whole = ShardReader(self._locate, setup.schema)
        # A sample finds what is wrong with prompts, and leaves out columns that may be far larger.
        self._sample = ParquetReader(self._locate, self._narrow)
        self._samplings = SamplingHashes()

    def count(self, task: Task, stop: Event | None = None) -> RangeCounts:
        """Go through the task's ranges; fewer of them once ``stop`` is set."""
        counts = RangeCounts()
        for shard, rows in self._ranges(task):
            if stop is not None and stop.is_set():
                break
            counts.add_range(shard.shard_id, self._rendered(shard, rows, task.is_sample), self._samplings)
        return counts

    def prompts(self, task: Task) -> list[Prompt]:
        """Those of the task's rows that have one."""
        return [
            each
            for shard, rows in self._ranges(task)
            for each in self._rendered(shard, rows, task.is_sample)
            if isinstance(each, Prompt)
        ]

    def _ranges(self, task: Task) -> Iterator[tuple[Shard, WorkUnit]]:
        shards = {shard.shard_id: shard for shard in task.shards}
        for shard_id, members in groupby(task.ranges, key=lambda window: window.shard_id):
            shard, ranges = shards[shard_id], list(members)
            if task.max_skipped_bytes is not None:
                share = sum(each.num_rows for each in ranges) / sum(each.num_rows for each in task.ranges)
                ranges = self._moved(shard, ranges, task.max_skipped_bytes * share)
            for each in ranges:
                yield shard, each

    def _rendered(self, shard: Shard, rows: WorkUnit, is_sample: bool) -> list[Prompt | RowError]:
        """The prompts and dead letters of a row range, in order."""
        reader = self._sample if is_sample and shard.lines is None else self._whole
        read = reader.read_unit(shard, rows)
        row_ids = [rows.row_id(offset) for offset in range(rows.num_rows)]
        good = [offset for offset in range(read.table.num_rows) if offset not in read.rejected]
        table = read.table if len(good) == read.table.num_rows else read.table.take(pa.array(good, pa.int64()))
        prompts = iter(self._renderer.render(table, [row_ids[offset] for offset in good]))
        rendered: list[Prompt | RowError] = []
        for offset, row_id in enumerate(row_ids):
            if offset >= read.table.num_rows:
                rendered.append(RowError(row_id, _SHARD_CORRUPT, str(read.error)))
            elif (reason := read.rejected.get(offset)) is not None:
                rendered.append(RowError(row_id, reason.error_type, reason.error))
            else:
                rendered.append(next(prompts))
        return rendered

    def _moved(self, shard: Shard, windows: Sequence[WorkUnit], max_skipped_bytes: float) -> list[WorkUnit]:
        """The windows where reading is cheap enough; lines can be entered at any place."""
        if shard.lines is not None:
            return list(windows)
        try:
            groups = read_row_groups(self._locate(shard.uri), shard, self._narrow.names)
        except (ShardCorrupt, pa.ArrowException):
            # Changed since it was planned; the reader says so of every row.
            return list(windows)
        max_skipped_rows = int(max_skipped_bytes / len(windows) / max(1.0, groups.bytes_per_row))
        return within_reach(windows, groups.starts, max_skipped_rows)


#: This worker process's. The surveyor is made by the first task: what an initializer raises arrives without its words.
_setup: WorkerSetup | None = None
_surveyor: Surveyor | None = None
_stop: Event | None = None


def start_worker(setup: WorkerSetup, stop: Event) -> None:
    """What the pool starts a process with."""
    global _setup, _stop
    _setup, _stop = setup, stop
    # Each worker is one thread of the tokeniser; the cores are shared out by processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def count(task: Task) -> RangeCounts:
    """Of one task; raises JobError or StorageUnavailable as a replica would."""
    global _surveyor
    assert _setup is not None
    if _surveyor is None:
        _surveyor = Surveyor(_setup)
    return _surveyor.count(task, _stop)
