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

from batchinfer.cluster.choices import choose, sequences_of_choices
from batchinfer.cluster.conversations import Conversations, completions
from batchinfer.cluster.engine_loop import EngineClosed, EngineLoop, Snapshot
from batchinfer.cluster.idle_clock import IdleClock
from batchinfer.cluster.journal_keeper import JournalKeeper, UnitJournal
from batchinfer.cluster.messages import Assignment, Drained, ProbeResult
from batchinfer.cluster.request_sharing import RequestSharing
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_spans import NO_UNIT_SPANS, UnitSpans
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.quality import CompletionJudge
from batchinfer.records import Completion, Prompt, RowError, UnitResult, WorkUnit
from batchinfer.storage.location import Location
from batchinfer.storage.reader import UnitRows
from batchinfer.storage.shard_reader import ShardReader
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
    #: Tokens that came out of the journal, and sequences that got the end of an identical one.
    num_resumed_tokens: int = 0
    num_shared_sequences: int = 0


class UnitPipeline:
    """Carries units of one job through one engine. Any number of threads may call :meth:`carry` at once."""

    def __init__(
        self,
        *,
        reader: ShardReader,
        renderer: PromptRenderer,
        engine_loop: EngineLoop,
        texts: Texts,
        output: Location,
        part: PartFormat,
        journals: JournalKeeper,
        judge: CompletionJudge = CompletionJudge(),  # noqa: B008 - frozen
        spans: UnitSpans = NO_UNIT_SPANS,
        idle_clock: IdleClock | None = None,
    ) -> None:
        """``idle_clock`` is the engine loop's: it learns which stages units are in; None = nobody asks."""
        self._reader = reader
        self._renderer = renderer
        self._engine_loop = engine_loop
        self._texts = texts
        self._output = output
        self._part = part
        self._journals = journals
        self._judge = judge
        self._spans = spans
        self._idle_clock = idle_clock or IdleClock()
        self._sharing = RequestSharing()
        self._conversations = Conversations(renderer, texts)
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
            with self._idle_clock.stage("preparing"):
                work, journal, resumed = self._preparers.submit(self._begin, assignment, prepare).result()
            try:
                with self._idle_clock.stage("generating"), self._spans.stage(assignment, "generate"):
                    generated = self._generate(resumed, journal)
                with self._idle_clock.stage("publishing"):
                    return self._publishers.submit(self._end, work, generated, journal, finish).result()
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
        with self._spans.stage(assignment, "read"):
            rows = self._reader.read_unit(assignment.shard, assignment.unit)
        self._lived()
        wanted = range(assignment.unit.num_rows) if offsets is None else offsets
        with self._spans.stage(assignment, "render"):
            prompts, errors = self._prompts(assignment, rows, wanted)
        self._lived()
        sequences = tuple(sequence for prompt in prompts for sequence in _sequences(prompt))
        return Work(assignment, rows.table, sequences, errors, started_s)

    def publish(self, work: Work, outcome: Outcome) -> UnitResult:
        """Commit a unit all of whose rows are in ``outcome``."""
        unit = work.assignment.unit
        with self._spans.stage(work.assignment, "publish"):
            published = publish_unit(self._output, unit, work.rows, outcome.completions, outcome.errors, self._part)
        result = _result(unit, outcome, published, time.monotonic() - work.started_s)
        return replace(result, quality=self.quality(outcome))

    def quality(self, outcome: Outcome) -> dict[str, int]:
        """Number of the completions by what is amiss with them."""
        return self._judge.count(outcome.completions)

    def _begin(
        self, assignment: Assignment, prepare: Callable[[Assignment], Work]
    ) -> tuple[Work, UnitJournal, tuple[list[Generation], list[Sequence]]]:
        """Beside the unit and its journal: the ends that the journal knows, and the sequences to go on with."""
        work = prepare(assignment)
        journal = self._journals.open(assignment)
        resumed = self._conversations.resume(journal, work.sequences)
        self._lived()
        return work, journal, resumed

    def _generate(self, resumed: tuple[list[Generation], list[Sequence]], journal: UnitJournal) -> "_Generated":
        """The ends of all sequences: those the journal knows, those the engine makes now, and those of their twins."""

        def on_snapshot(snapshot: Snapshot) -> None:
            journal.take(snapshot)
            self._journals.flush_soon(journal)

        ended, left = resumed
        num_resumed = sum(len(it.token_ids) for it in ended) + sum(len(it.token_ids) for it in left)
        shared = self._sharing.sort_out(left, ended)
        # A crash inside loses the tokens since the last flush, never rows.
        generated = self._engine_loop.generate(shared.leaders, on_snapshot, self._conversations.next_turn)
        journal.take(Snapshot(tuple(generated)))
        self._sharing.remember(shared, generated)
        return _Generated(ended + generated + shared.fan_out(generated), num_resumed, shared.num_shared)

    def _end(
        self,
        work: Work,
        generated: "_Generated",
        journal: UnitJournal,
        finish: Callable[[Work, Outcome, UnitJournal], Result],
    ) -> Result:
        outcome = replace(
            self._outcome(work, generated.ends),
            num_resumed_tokens=generated.num_resumed_tokens,
            num_shared_sequences=generated.num_shared_sequences,
        )
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
        chosen = choose(gen for gen in whole if gen.sequence.forced)
        answered = completions([gen for gen in whole if not gen.sequence.forced], self._texts)
        return Outcome(
            [*answered, *(it for it in chosen if isinstance(it, Completion))],
            [*work.errors, *failed.values(), *(it for it in chosen if isinstance(it, RowError))],
        )

    def _prompts(
        self, assignment: Assignment, rows: UnitRows, offsets: SequenceOf[int]
    ) -> tuple[list[Prompt], list[RowError]]:
        unit, num_rows, poisoned = assignment.unit, rows.table.num_rows, frozenset(assignment.poisoned)
        rejected = {offset: rows.rejected[offset] for offset in offsets if offset in rows.rejected}
        no_prompts = poisoned | rejected.keys()
        to_render = [offset for offset in offsets if offset < num_rows and offset not in no_prompts]
        are_all = to_render == list(range(num_rows))
        table = rows.table if are_all else rows.table.take(pa.array(to_render, pa.int64()))
        rendered = self._renderer.render(table, [unit.row_id(offset) for offset in to_render])
        prompts = [item for item in rendered if isinstance(item, Prompt)]
        errors = [item for item in rendered if isinstance(item, RowError)]
        errors += [RowError(unit.row_id(offset), it.error_type, it.error) for offset, it in rejected.items()]
        errors += [
            RowError(unit.row_id(offset), KILLED_REPLICA, KILLED_REPLICA_ERROR, assignment.attempt)
            for offset in offsets
            if offset < num_rows and offset in poisoned and offset not in rejected
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


@dataclass(frozen=True, slots=True)
class _Generated:
    """The ends of all of a unit's sequences, and what of them cost nothing."""

    ends: SequenceOf[Generation]
    #: Tokens that the journal knew.
    num_resumed_tokens: int
    num_shared_sequences: int


def _sequences(prompt: Prompt) -> tuple[Sequence, ...]:
    """What a row is generated as."""
    if prompt.choice_token_ids:
        return sequences_of_choices(prompt)
    return tuple(Sequence(prompt, sample) for sample in range(prompt.sampling.n))


def journaled(work: Work, outcome: Outcome, journal: UnitJournal) -> ProbeResult:
    """The end of a probe: everything is in the unit's journal, nothing is committed."""
    journal.flush()
    return ProbeResult(work.assignment.unit.unit_id, work.assignment.offsets)


def _result(unit: WorkUnit, outcome: Outcome, published: PublishOutcome, elapsed_s: float) -> UnitResult:
    completions, errors = outcome.completions, outcome.errors
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return UnitResult(
        unit_id=unit.unit_id,
        num_rows=unit.num_rows,
        num_completions=len(completions),
        num_dead_letters=len(errors),
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions if completion.sample == 0),
        num_completion_tokens=num_tokens,
        elapsed_s=elapsed_s,
        already_committed=published is PublishOutcome.ALREADY_COMMITTED,
        # Choices that were not the likeliest are in the journal too, but in no completion.
        num_resumed_tokens=min(outcome.num_resumed_tokens, num_tokens),
        num_shared_sequences=outcome.num_shared_sequences,
        dead_letters_by_type=dict(Counter(error.error_type for error in errors)),
    )
