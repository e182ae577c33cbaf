"""Journals of the units that a replica holds: snapshots come in from the engine's thread, other threads write them.

The engine never waits for storage: it leaves a snapshot and goes on. A journal that cannot be written costs no unit
anything but its insurance; it is logged, and the next flush writes what this one could not.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from batchinfer.cluster.engine_loop import Snapshot
from batchinfer.cluster.messages import Assignment
from batchinfer.engine.engine import Generation, Partial, Sequence
from batchinfer.errors import BatchinferError
from batchinfer.storage.journal import JournaledSequence, JournalWriter, SequenceId, read_journal, remove_journal
from batchinfer.storage.location import Location
from batchinfer.storage.segment import checksum, tokens_of

logger = logging.getLogger(__name__)

#: Threads that write journals while units are generated.
NUM_THREADS = 2


class UnitJournal:
    """The journal of one unit in hand: what former holders left, and what this replica adds. For any thread."""

    def __init__(
        self, output: Location, unit_id: str, writer: JournalWriter, known: Mapping[SequenceId, JournaledSequence]
    ) -> None:
        self._output = output
        self._unit_id = unit_id
        self._writer = writer
        self._known = known
        #: News that no flush has taken yet.
        self._ended: list[Generation] = []
        self._in_progress: tuple[Partial, ...] = ()
        self._news_lock = threading.Lock()
        #: Held while storage is written, so that nothing appears in a journal after its removal.
        self._storage_lock = threading.Lock()
        self._is_closed = False

    @property
    def num_rows(self) -> int:
        """Rows of which the journal holds something."""
        return self._writer.num_rows

    @property
    def num_tokens(self) -> int:
        """Tokens that the journal holds."""
        return self._writer.num_tokens

    def resume(self, sequences: Iterable[Sequence]) -> tuple[list[Generation], list[Sequence]]:
        """Hold sequences against what former holders generated: (those that have ended, those to go on with)."""
        ended: list[Generation] = []
        left: list[Sequence] = []
        if not self._known:
            return ended, list(sequences)
        for sequence in sequences:
            known = self._known.get((*sequence.sequence_id, sequence.turn))
            # A turn generated behind other answers, which this row's turns before have not come to, is no part of it.
            if known is None or known.prompt_checksum != _prompt_checksum(sequence):
                left.append(sequence)
            elif known.has_ended:
                ended.append(_generation(sequence, known))
            else:
                left.append(replace(sequence, token_ids=known.token_ids, logprobs=known.logprobs))
        return ended, left

    def take(self, snapshot: Snapshot) -> None:
        """Keep the news for the next flush. Returns at once."""
        with self._news_lock:
            self._ended += snapshot.ended
            self._in_progress = snapshot.in_progress

    def flush(self) -> None:
        """Write what has been taken since; nothing after a close.

        Raises StorageUnavailable or OutputError; the next flush then writes it.
        """
        with self._storage_lock:
            if self._is_closed:
                return
            with self._news_lock:
                ended, self._ended = self._ended, []
                in_progress, self._in_progress = self._in_progress, ()
            self._writer.flush([*map(_ended_sequence, ended), *map(_partial_sequence, in_progress)])

    def save(self) -> bool:
        """Flush; a failure is a warning. Whether everything is in the journal."""
        try:
            self.flush()
        except BatchinferError as error:
            logger.warning(
                "unit %s: its journal cannot be written (%s); a crash would cost what is not in it",
                self._unit_id,
                error,
            )
            return False
        return True

    def close(self) -> None:
        """Write nothing more; waits for a flush under way."""
        with self._storage_lock:
            self._is_closed = True

    def remove(self) -> None:
        """Close, and remove the journal: its unit is committed. No storage is asked where there is none.

        A crash before the end, and a failure, which is a warning, leave segments that the next run removes.
        """
        self.close()
        if not self._writer.num_segments:
            return
        try:
            remove_journal(self._output, self._unit_id)
        except BatchinferError as error:
            logger.warning("unit %s is committed, but its journal cannot be removed: %s", self._unit_id, error)


class JournalKeeper:
    """Opens the journals of a replica's units, and has threads that write them.

    ``fingerprint`` tells journals of different jobs apart: one that was written under another is not resumed from.
    """

    def __init__(self, output: Location, fingerprint: str, run_id: str) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._run_id = run_id
        self._lock = threading.Lock()
        self._writers = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="journal")
        #: Flushes asked for and not begun: one per unit is enough, it takes all news there is.
        self._waiting: set[UnitJournal] = set()
        #: What the threads' flushes came to, for metrics.
        self.num_flushes = 0
        self.flush_s = 0.0

    def open(self, assignment: Assignment) -> UnitJournal:
        """Read what the unit's former holders left: one listing, and the segments if there are any.

        Raises StorageUnavailable or OutputError.
        """
        unit_id = assignment.unit.unit_id
        known = read_journal(self._output, unit_id, self._fingerprint)
        writer = JournalWriter(self._output, unit_id, self._fingerprint, self._run_id, assignment.lease, known)
        return UnitJournal(self._output, unit_id, writer, known.sequences)

    def flush_soon(self, journal: UnitJournal) -> None:
        """Have a thread flush it. Returns at once."""
        with self._lock:
            if journal in self._waiting:
                return
            self._waiting.add(journal)
        self._writers.submit(self._flush, journal)

    def _flush(self, journal: UnitJournal) -> None:
        with self._lock:
            self._waiting.discard(journal)
        began_s = time.monotonic()
        journal.save()
        with self._lock:
            self.num_flushes += 1
            self.flush_s += time.monotonic() - began_s


def _generation(sequence: Sequence, known: JournaledSequence) -> Generation:
    """The end of a sequence as the engine would have returned it."""
    has_logprobs = sequence.prompt.sampling.logprobs is not None and known.error is None
    return Generation(
        sequence,
        known.token_ids,
        known.finish_reason or "length",
        known.logprobs if has_logprobs else None,
        known.error,
    )


def _ended_sequence(generation: Generation) -> JournaledSequence:
    journaled = _journaled(generation.sequence)
    if generation.error is not None:
        return replace(journaled, error=generation.error)
    return replace(
        journaled,
        token_ids=tuple(generation.token_ids),
        logprobs=generation.logprobs or (),
        finish_reason=generation.finish_reason,
    )


def _partial_sequence(partial: Partial) -> JournaledSequence:
    return replace(_journaled(partial.sequence), token_ids=partial.token_ids, logprobs=partial.logprobs)


def _journaled(sequence: Sequence) -> JournaledSequence:
    """The sequence without any token."""
    row_id, sample = sequence.sequence_id
    return JournaledSequence(row_id, sample, turn=sequence.turn, prompt_checksum=_prompt_checksum(sequence))


def _prompt_checksum(sequence: Sequence) -> int:
    """Of the first turn it is 0: what its prompt is made of, the row and the job, is the same for all holders."""
    return checksum(tokens_of(sequence.prompt.token_ids)) if sequence.turn else 0
