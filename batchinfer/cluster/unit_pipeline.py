"""The way of one work unit through a replica: read, render and tokenise, resume, generate, detokenise, publish.

Every unit is walked through it by a thread of its own, which mostly waits: rows are prepared and published by
a few threads that all units share, and generated on the engine's thread, where the rows of all units in flight
share the batch. Here engine and storage meet.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa

from batchinfer.cluster.engine_loop import EngineClosed, EngineLoop, Snapshot
from batchinfer.cluster.journal_keeper import JournalKeeper, UnitJournal
from batchinfer.cluster.messages import Assignment, Drained, ProbeResult
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.stopping import cut_text
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Completion, Prompt, RowError, UnitResult, WorkUnit
from batchinfer.storage.location import Location
from batchinfer.storage.reader import ParquetReader, UnitRows
from batchinfer.storage.writer import PartFormat, PublishOutcome, publish_unit

Result = TypeVar("Result")

#: Dead letter of a row behind the damage in a corrupt shard.
SHARD_CORRUPT = "shard_corrupt"
#: Dead letter of a row that the work queue has found to kill replicas.
KILLED_REPLICA = "killed_replica"
KILLED_REPLICA_ERROR = "killed its replica twice when it was generated alone"

#: Threads that prepare units, and threads that publish them. Few on purpose: the allocators keep memory for each
#: thread that ever worked, and Ray's pool for an actor has one for every call it may serve.
NUM_THREADS = 2
#: Share of a drain's time that the engine's current step may take; the rest is for writing journals.
STEP_SHARE = 0.6


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
class Work:
    """A unit between its reading and its end."""

    assignment: Assignment
    #: All rows of the unit, fewer where a damaged shard gave no more.
    rows: pa.Table
    sequences: tuple[Sequence, ...]
    #: Dead letters found before the engine saw the unit.
    errors: list[RowError]
    started_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the rows of some work: each is in one of the two lists."""

    completions: list[Completion]
    errors: list[RowError]
    #: Tokens that came out of the journal.
    num_resumed_tokens: int = 0


class UnitPipeline:
    """Carries units of one job through one engine. Any number of threads may call :meth:`carry` at once."""

    def __init__(
        self,
        *,
        reader: ParquetReader,
        renderer: PromptRenderer,
        engine_loop: EngineLoop,
        texts: Texts,
        output: Location,
        part: PartFormat,
        journals: JournalKeeper,
    ) -> None:
        self._reader = reader
        self._renderer = renderer
        self._engine_loop = engine_loop
        self._texts = texts
        self._output = output
        self._part = part
        self._journals = journals
        self._preparers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prepare")
        self._publishers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="publish")
        #: Guards what follows; notified when a unit leaves.
        self._door = threading.Condition()
        self._num_in_hand = 0
        self._num_stages_done = 0
        self._is_draining = False
        self._num_rows_journaled = 0
        self._num_tokens_journaled = 0

    @property
    def num_in_hand(self) -> int:
        """Units that are being carried now."""
        return self._num_in_hand

    @property
    def num_stages_done(self) -> int:
        """Grows whenever a unit has been read, rendered or published: a sign of life beside the engine's."""
        return self._num_stages_done

    def run(self, assignment: Assignment) -> UnitResult:
        """Generate the unit and commit it, whatever becomes of its single rows. May be repeated at any time.

        Raises what :meth:`carry` does.
        """
        return self.carry(assignment, self.prepare, self._commit)

    def probe(self, assignment: Assignment) -> ProbeResult:
        """Generate the rows at ``assignment.offsets`` and journal all of them; commits nothing.

        Raises what :meth:`carry` does; the rows are journaled if it raises nothing.
        """
        return self.carry(assignment, lambda it: self.prepare(it, it.offsets), journaled)

    def drain(self, timeout_s: float) -> Drained:
        """Stop after the engine's current step and journal what is in flight; no publication is begun any more.

        Callers of :meth:`carry` get EngineClosed; a publication under way is waited for. Storage that holds a unit up
        is given until ``timeout_s``, a step less: what they have not brought by then is generated again.
        """
        until_s = time.monotonic() + timeout_s
        with self._door:
            self._is_draining = True
        self._engine_loop.close(timeout_s * STEP_SHARE)
        with self._door:
            # Every unit's thread writes its own journal on its way out.
            self._door.wait_for(lambda: self._num_in_hand == 0, until_s - time.monotonic())
            return Drained(self._num_rows_journaled, self._num_tokens_journaled)

    def carry(
        self,
        assignment: Assignment,
        prepare: Callable[[Assignment], Work],
        finish: Callable[[Work, Outcome, UnitJournal], Result],
    ) -> Result:
        """Take a unit from ``prepare`` through the engine to ``finish``, whose value is returned.

        Sequences that the unit's journal knows are not generated again. What was generated is journaled when anything
        raises; ``finish`` removes the journal once it is not needed any more. Both run on threads shared by all units.

        Raises:
            StorageUnavailable, OutputError: shard, journal or output cannot be reached.
            EngineFailed: the engine is unusable, and this replica with it.
            EngineClosed: the replica was drained.
        """
        with self._door:
            self._num_in_hand += 1
        try:
            work, journal = self._preparers.submit(self._begin, assignment, prepare).result()
            try:
                generations, num_resumed = self._generate(work, journal)
                return self._publishers.submit(self._end, work, generations, num_resumed, journal, finish).result()
            except BaseException:
                journal.save()
                self._count_journaled(journal)
                raise
            finally:
                journal.close()
        finally:
            with self._door:
                self._num_in_hand -= 1
                self._door.notify_all()

    def prepare(self, assignment: Assignment, offsets: SequenceOf[int] | None = None) -> Work:
        """Read the unit and make sequences of the rows at ``offsets`` (None = all of them), in row order."""
        started_s = time.monotonic()
        rows = self._reader.read_unit(assignment.shard, assignment.unit)
        self._lived()
        wanted = range(assignment.unit.num_rows) if offsets is None else offsets
        prompts, errors = self._prompts(assignment, rows, wanted)
        self._lived()
        sequences = tuple(Sequence(prompt, sample) for prompt in prompts for sample in range(prompt.sampling.n))
        return Work(assignment, rows.table, sequences, errors, started_s)

    def publish(self, work: Work, outcome: Outcome) -> UnitResult:
        """Commit a unit all of whose rows are in ``outcome``."""
        unit = work.assignment.unit
        published = publish_unit(self._output, unit, work.rows, outcome.completions, outcome.errors, self._part)
        return _result(unit, outcome, published, time.monotonic() - work.started_s)

    def _begin(self, assignment: Assignment, prepare: Callable[[Assignment], Work]) -> tuple[Work, UnitJournal]:
        work = prepare(assignment)
        journal = self._journals.open(assignment)
        self._lived()
        return work, journal

    def _generate(self, work: Work, journal: UnitJournal) -> tuple[list[Generation], int]:
        """The ends of all sequences, those that the journal knows and those that the engine makes now.

        Beside them the number of tokens that the journal knew.
        """

        def on_snapshot(snapshot: Snapshot) -> None:
            journal.take(snapshot)
            self._journals.flush_soon(journal)

        ended, left = journal.resume(work.sequences)
        num_resumed = sum(len(it.token_ids) for it in ended) + sum(len(it.token_ids) for it in left)
        # A crash inside loses the tokens since the last flush, never rows.
        generated = self._engine_loop.generate(left, on_snapshot)
        journal.take(Snapshot(tuple(generated)))
        return ended + generated, num_resumed

    def _end(
        self,
        work: Work,
        generations: SequenceOf[Generation],
        num_resumed_tokens: int,
        journal: UnitJournal,
        finish: Callable[[Work, Outcome, UnitJournal], Result],
    ) -> Result:
        outcome = replace(self._outcome(work, generations), num_resumed_tokens=num_resumed_tokens)
        with self._door:
            # A drained replica is about to be gone, and another one may have the unit: it is left as it is.
            if self._is_draining:
                raise EngineClosed("the replica is closing")
        result = finish(work, outcome, journal)
        self._lived()
        return result

    def _commit(self, work: Work, outcome: Outcome, journal: UnitJournal) -> UnitResult:
        result = self.publish(work, outcome)
        # A crash here leaves the journal of a committed unit, which nobody reads; the next run removes it.
        journal.remove()
        return result

    def _outcome(self, work: Work, generations: SequenceOf[Generation]) -> Outcome:
        failed = {gen.error.row_id: gen.error for gen in generations if gen.error is not None}
        # A row with one failed sample is a dead letter as a whole; its other samples would be half a row.
        whole = [gen for gen in generations if gen.sequence.prompt.row_id not in failed]
        return Outcome(self._completions(whole), [*work.errors, *failed.values()])

    def _prompts(
        self, assignment: Assignment, rows: UnitRows, offsets: SequenceOf[int]
    ) -> tuple[list[Prompt], list[RowError]]:
        unit, num_rows, poisoned = assignment.unit, rows.table.num_rows, frozenset(assignment.poisoned)
        to_render = [offset for offset in offsets if offset < num_rows and offset not in poisoned]
        are_all = to_render == list(range(num_rows))
        table = rows.table if are_all else rows.table.take(pa.array(to_render, pa.int64()))
        rendered = self._renderer.render(table, [unit.row_id(offset) for offset in to_render])
        prompts = [item for item in rendered if isinstance(item, Prompt)]
        errors = [item for item in rendered if isinstance(item, RowError)]
        errors += [
            RowError(unit.row_id(offset), KILLED_REPLICA, KILLED_REPLICA_ERROR, assignment.attempt)
            for offset in offsets
            if offset < num_rows and offset in poisoned
        ]
        errors += [
            RowError(unit.row_id(offset), SHARD_CORRUPT, str(rows.error), assignment.attempt)
            for offset in offsets
            if offset >= num_rows
        ]
        return prompts, errors

    def _count_journaled(self, journal: UnitJournal) -> None:
        with self._door:
            if self._is_draining:
                self._num_rows_journaled += journal.num_rows
                self._num_tokens_journaled += journal.num_tokens

    def _lived(self) -> None:
        with self._door:
            self._num_stages_done += 1

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


def journaled(work: Work, outcome: Outcome, journal: UnitJournal) -> ProbeResult:
    """The end of a probe: everything is in the unit's journal, nothing is committed."""
    journal.flush()
    return ProbeResult(work.assignment.unit.unit_id, work.assignment.offsets)


def _result(unit: WorkUnit, outcome: Outcome, published: PublishOutcome, elapsed_s: float) -> UnitResult:
    completions, errors = outcome.completions, outcome.errors
    return UnitResult(
        unit_id=unit.unit_id,
        num_rows=unit.num_rows,
        num_completions=len(completions),
        num_dead_letters=len(errors),
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions if completion.sample == 0),
        num_completion_tokens=sum(len(completion.token_ids) for completion in completions),
        elapsed_s=elapsed_s,
        already_committed=published is PublishOutcome.ALREADY_COMMITTED,
        num_resumed_tokens=outcome.num_resumed_tokens,
        dead_letters_by_type=dict(Counter(error.error_type for error in errors)),
    )
