"""The way of one work unit through a replica: read, render and tokenise, generate, detokenise, publish.

Every unit is walked through it by a thread of its own, which mostly waits: rows are prepared and published by
a few threads that all units share, and generated on the engine's thread, where the rows of all units in flight
share the batch. Here engine and storage meet.
"""

import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.cluster.engine_loop import EngineLoop
from batchinfer.cluster.messages import Assignment
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.stopping import cut_text
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Completion, Prompt, RowError, UnitResult, WorkUnit
from batchinfer.storage.location import Location
from batchinfer.storage.reader import ParquetReader, UnitRows
from batchinfer.storage.writer import PartFormat, PublishOutcome, publish_unit

#: Dead letter of a row behind the damage in a corrupt shard.
SHARD_CORRUPT = "shard_corrupt"

#: Threads that prepare units, and threads that publish them. Few on purpose: the allocators keep memory for each
#: thread that ever worked, and Ray's pool for an actor has one for every call it may serve.
NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class Texts:
    """How token ids of a completion become its text; ``detokenizer`` is None for a model without a tokenizer."""

    detokenizer: Detokenizer | None
    eos_token_ids: frozenset[int]

    def of(self, generations: SequenceOf[Generation]) -> list[str]:
        """One text each, without the id or the string that stopped it; empty without a tokenizer."""
        detokenizer = self.detokenizer
        if detokenizer is None:
            return [""] * len(generations)
        texts = detokenizer.decode_batch([self._without_stop_id(generation) for generation in generations])
        return [self._cut(text, generation) for text, generation in zip(texts, generations, strict=True)]

    def _without_stop_id(self, generation: Generation) -> SequenceOf[int]:
        token_ids = generation.token_ids
        if generation.finish_reason != "stop" or not token_ids:
            return token_ids
        is_stop_id = token_ids[-1] in self.eos_token_ids or (
            token_ids[-1] in generation.sequence.prompt.sampling.stop_token_ids
        )
        return token_ids[:-1] if is_stop_id else token_ids

    def _cut(self, text: str, generation: Generation) -> str:
        sampling = generation.sequence.prompt.sampling
        if not sampling.stop or generation.finish_reason != "stop" or self.detokenizer is None:
            return text
        ignored = generation.token_ids[: sampling.min_new_tokens]
        return cut_text(text, sampling.stop, len(self.detokenizer.decode(ignored)) if ignored else 0)


@dataclass(frozen=True, slots=True)
class _Work:
    """A unit between its reading and its commit."""

    assignment: Assignment
    rows: pa.Table
    sequences: tuple[Sequence, ...]
    #: Dead letters found before the engine saw the unit.
    errors: list[RowError]


class UnitPipeline:
    """Runs units of one job through one engine. Any number of threads may call :meth:`run` at once."""

    def __init__(
        self,
        *,
        reader: ParquetReader,
        renderer: PromptRenderer,
        engine_loop: EngineLoop,
        texts: Texts,
        output: Location,
        part: PartFormat,
    ) -> None:
        self._reader = reader
        self._renderer = renderer
        self._engine_loop = engine_loop
        self._texts = texts
        self._output = output
        self._part = part
        self._preparers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prepare")
        self._publishers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="publish")

    def run(self, assignment: Assignment) -> UnitResult:
        """Generate the unit and commit it, whatever becomes of its single rows. May be repeated at any time.

        Raises:
            StorageUnavailable, OutputError: shard or output cannot be reached.
            EngineFailed: the engine is unusable, and this replica with it.
        """
        started_s = time.monotonic()
        work = self._preparers.submit(self._prepare, assignment).result()
        # A crash here loses tokens, never rows: nothing of the unit is on disk before publish_unit.
        generations = self._engine_loop.generate(work.sequences)
        return self._publishers.submit(self._publish, work, generations, started_s).result()

    def _prepare(self, assignment: Assignment) -> "_Work":
        rows = self._reader.read_unit(assignment.shard, assignment.unit)
        prompts, errors = self._prompts(assignment, rows)
        sequences = tuple(Sequence(prompt, sample) for prompt in prompts for sample in range(prompt.sampling.n))
        return _Work(assignment, rows.table, sequences, errors)

    def _publish(self, work: "_Work", generations: SequenceOf[Generation], started_s: float) -> UnitResult:
        failed = {gen.error.row_id: gen.error for gen in generations if gen.error is not None}
        errors = [*work.errors, *failed.values()]
        # A row with one failed sample is a dead letter as a whole; its other samples would be half a row.
        completions = self._completions([gen for gen in generations if gen.sequence.prompt.row_id not in failed])
        unit = work.assignment.unit
        outcome = publish_unit(self._output, unit, work.rows, completions, errors, self._part)
        return _result(unit, completions, errors, outcome, time.monotonic() - started_s)

    def _prompts(self, assignment: Assignment, rows: UnitRows) -> tuple[list[Prompt], list[RowError]]:
        unit = assignment.unit
        num_rows = rows.table.num_rows
        rendered = self._renderer.render(rows.table, [unit.row_id(offset) for offset in range(num_rows)])
        prompts = [item for item in rendered if isinstance(item, Prompt)]
        errors = [item for item in rendered if isinstance(item, RowError)]
        errors += [
            RowError(unit.row_id(offset), SHARD_CORRUPT, str(rows.error), assignment.attempt)
            for offset in range(num_rows, unit.num_rows)
        ]
        return prompts, errors

    def _completions(self, generations: SequenceOf[Generation]) -> list[Completion]:
        return [
            Completion(
                row_id=generation.sequence.prompt.row_id,
                sample=generation.sequence.sample,
                text=text,
                token_ids=generation.token_ids,
                finish_reason=generation.finish_reason,
                num_prompt_tokens=len(generation.sequence.prompt.token_ids),
                logprobs=generation.logprobs,
            )
            for generation, text in zip(generations, self._texts.of(generations), strict=True)
        ]


def _result(
    unit: WorkUnit,
    completions: SequenceOf[Completion],
    errors: SequenceOf[RowError],
    outcome: PublishOutcome,
    elapsed_s: float,
) -> UnitResult:
    return UnitResult(
        unit_id=unit.unit_id,
        num_rows=unit.num_rows,
        num_completions=len(completions),
        num_dead_letters=len(errors),
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions if completion.sample == 0),
        num_completion_tokens=sum(len(completion.token_ids) for completion in completions),
        elapsed_s=elapsed_s,
        already_committed=outcome is PublishOutcome.ALREADY_COMMITTED,
        dead_letters_by_type=dict(Counter(error.error_type for error in errors)),
    )
