"""What units in flight have generated so far: so that a crash costs seconds of tokens, not the unit's hours.

::

    _job/journal/<unit id>/<run id>-<lease:08d>-<k:06d>.arrow    one immutable *segment* per flush

Each holder of a unit writes segments of its own and nobody changes one. Holders follow each other by (run id,
lease), and one that lost its unit may go on writing without knowing (a zombie), with other tokens even, since
floating-point noise may draw another one. So every record names the position it goes on from and a checksum of the
tokens before: reading walks the segments in order, a record cuts what is known at its position and adds its tokens,
and one whose checksum does not fit what is known is left out. Whatever is lost, damaged or written late, what is
read of a sequence is therefore the beginning of what some one writer had, never a mix of two. Each turn of a
conversation is a sequence of its own; one behind the first has a checksum of its prompt, in which the answers before
it are, so that it counts behind those only.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from batchinfer.records import FinishReason, RowError, TokenLogprobs
from batchinfer.storage.layout import JOURNAL, journal_directory, parse_unit_id, staging
from batchinfer.storage.location import Location
from batchinfer.storage.segment import (
    JournalRecord,
    SegmentDamaged,
    SegmentOrigin,
    checksum,
    decode_segment,
    encode_segment,
    tokens_of,
)

logger = logging.getLogger(__name__)

#: A journal of so many segments is written whole into one more, and they go: reading stays a matter of a few files.
MAX_SEGMENTS: Final = 32

#: A holder that finds a segment gone looks again: the unit's former holder, still alive, has written its journal whole.
_NUM_LOOKS: Final = 3
_READ_THREADS: Final = 8
_SEGMENT_NAME = re.compile(r"(?P<run>.+)-(?P<lease>\d{8,})-(?P<k>\d{6,})\.arrow")

#: (row id, sample, turn).
SequenceId = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class JournaledSequence:
    """How far one sequence has come. It has ended when it has a finish reason or an error."""

    row_id: str
    sample: int
    #: All its new tokens so far.
    token_ids: tuple[int, ...] = ()
    #: One for each of them where the prompt asked for logprobs, else empty.
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: RowError | None = None
    #: Of a row's conversation; and of the turn's prompt where it is not the first, else 0.
    turn: int = 0
    prompt_checksum: int = 0

    @property
    def sequence_id(self) -> SequenceId:
        return (self.row_id, self.sample, self.turn)

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Journal:
    """What a unit's journal says; the damaged segments among ``num_segments`` were left out."""

    sequences: Mapping[SequenceId, JournaledSequence] = field(default_factory=dict)
    #: Names of all segments found, in the order they count in.
    segments: tuple[str, ...] = ()
    num_damaged: int = 0

    @property
    def num_segments(self) -> int:
        return len(self.segments)


def journaled_units(output: Location) -> set[str]:
    """Ids of the units that have a journal now, by one listing of all segments.

    Directories do not count: some object stores show those that everything was removed from.
    """
    names = {file.name.partition("/")[0] for file in output.child(JOURNAL).files()}
    return {name for name in names if parse_unit_id(name) is not None}


def read_journal(output: Location, unit_id: str, fingerprint: str) -> Journal:
    """What the unit's former holders have generated of it; empty when there is no journal.

    One listing and one read per segment; memory is that of the segments and of what they say. Segments that are
    torn, changed or of another fingerprint are named in the log, counted and left out.

    Raises StorageUnavailable or OutputError when the journal cannot be read.
    """
    directory = journal_directory(output, unit_id)
    names, contents = _read_segments(directory)
    known: dict[SequenceId, _Growing] = {}
    num_damaged = 0
    for name, content in zip(names, contents, strict=True):
        try:
            records = _decode(name, content, unit_id, fingerprint)
        except SegmentDamaged as error:
            num_damaged += 1
            logger.warning("%s/%s: left out, %s; what only it held is generated again", directory, name, error)
            continue
        for record in records:
            known.setdefault((record.row_id, record.sample, record.turn), _Growing()).apply(record)
    sequences = {key: growing.sequence(*key) for key, growing in known.items() if growing.is_known}
    return Journal(sequences, names, num_damaged)


def remove_journal(output: Location, unit_id: str) -> None:
    """Remove the unit's journal; nothing happens when there is none.

    May be repeated. A crash in between leaves some segments, which are a journal too; those of a committed unit are
    removed by ``remove_journals_except``.
    """
    directory = journal_directory(output, unit_id)
    for name in directory.names():
        directory.child(name).remove()
    directory.remove_empty_directory()


def remove_journals_except(output: Location, unit_ids: Iterable[str]) -> None:
    """Remove the journals of all units but these, which are the ones still to do.

    For the run that holds the lease, before its replicas start: what is left of a unit that was committed, by a
    crash between commit and removal or by a zombie that went on writing.
    """
    for unit_id in sorted(journaled_units(output) - set(unit_ids)):
        remove_journal(output, unit_id)


class JournalWriter:
    """One holder's side of a unit's journal. One thread at a time flushes; the counts may be asked by any.

    ``known`` is what the holder has read and goes on from.
    """

    def __init__(
        self,
        output: Location,
        unit_id: str,
        fingerprint: str,
        run_id: str,
        lease: int,
        known: Journal | None = None,
    ) -> None:
        known = known or Journal()
        self._directory = journal_directory(output, unit_id)
        self._staging = staging(output)
        self._origin = SegmentOrigin(fingerprint, unit_id, run_id, lease)
        #: Of every sequence the newest state, and what of it is in the journal.
        self._sequences: dict[SequenceId, JournaledSequence] = dict(known.sequences)
        self._written = {key: _written(sequence) for key, sequence in known.sequences.items()}
        self._changed: set[SequenceId] = set()
        self._segments = list(known.segments)
        self._next_k = 1 + max(
            (k for *holder, k in map(_order, self._segments) if holder == [run_id, lease]), default=-1
        )

    @property
    def num_segments(self) -> int:
        """Segments that the journal has, as far as this writer knows."""
        return len(self._segments)

    @property
    def num_rows(self) -> int:
        """Rows of which the journal holds something."""
        return len({row_id for row_id, *_ in list(self._written)})

    @property
    def num_tokens(self) -> int:
        """Tokens that the journal holds."""
        return sum(written.num_tokens for written in list(self._written.values()))

    def flush(self, sequences: Iterable[JournaledSequence]) -> None:
        """Write what is new about these sequences, each given with all its tokens; writes nothing if nothing is.

        One that comes shorter than before is old news and ignored; one that begins with other tokens than before, or
        has another prompt, was started over, and what the journal says of it is replaced. What a failed call could not
        write is written by the next one.

        Raises StorageUnavailable or OutputError when the output cannot be written.
        """
        for sequence in sequences:
            self._take(sequence)
        if not self._changed:
            return
        if len(self._segments) >= MAX_SEGMENTS or self._is_overtaken():
            self._write_whole()
        else:
            self._write(sorted(self._changed), self._written)

    def _take(self, sequence: JournaledSequence) -> None:
        before = self._sequences.get(sequence.sequence_id)
        if before is None:
            if not sequence.token_ids and not sequence.has_ended:
                return
        elif before.prompt_checksum != sequence.prompt_checksum:
            self._written.pop(sequence.sequence_id, None)
        elif before.has_ended:
            return
        else:
            num_common = min(len(before.token_ids), len(sequence.token_ids))
            if before.token_ids[:num_common] != sequence.token_ids[:num_common]:
                self._written.pop(sequence.sequence_id, None)
            elif len(sequence.token_ids) <= len(before.token_ids) and not sequence.has_ended:
                return
        self._sequences[sequence.sequence_id] = sequence
        self._changed.add(sequence.sequence_id)

    def _is_overtaken(self) -> bool:
        """Whether a segment counts after those of this writer: a former run's clock went ahead of this one's."""
        ours = (self._origin.run_id, self._origin.lease, self._next_k)
        return any(_order(name) > ours for name in self._segments)

    def _write_whole(self) -> None:
        """Write all that is known into one segment and remove those before it, this writer's and former holders'.

        A crash before the removal ends leaves segments that say less than the whole one, which comes after them.
        """
        superseded = tuple(self._segments)
        self._write(sorted(self._sequences), {})
        for name in superseded:
            self._directory.child(name).remove()
            self._segments.remove(name)

    def _write(self, keys: Sequence[SequenceId], behind: Mapping[SequenceId, "_Written"]) -> None:
        records, written = [], {}
        for key in keys:
            before = behind.get(key, _Written(0, 0))
            record = _record(self._sequences[key], before)
            records.append(record)
            written[key] = _Written(
                before.num_tokens + len(record.token_ids), checksum(record.token_ids, before.checksum)
            )
        # A failed try may still arrive later, so its name is never used for other bytes.
        name = f"{self._origin.run_id}-{self._origin.lease:08d}-{self._next_k:06d}.arrow"
        self._next_k += 1
        # A crash up to here loses the news since the last flush; the segment appears whole or not at all.
        self._directory.child(name).write_replace(encode_segment(records, self._origin), self._staging)
        self._segments.append(name)
        self._written |= written
        self._changed.clear()


@dataclass(frozen=True, slots=True)
class _Written:
    """How much of a sequence is in the journal: tokens, and their checksum."""

    num_tokens: int
    checksum: int


def _written(sequence: JournaledSequence) -> _Written:
    return _Written(len(sequence.token_ids), checksum(tokens_of(sequence.token_ids)))


def _record(sequence: JournaledSequence, before: _Written) -> JournalRecord:
    return JournalRecord(
        row_id=sequence.row_id,
        sample=sequence.sample,
        position=before.num_tokens,
        prefix_checksum=before.checksum,
        token_ids=tokens_of(sequence.token_ids[before.num_tokens :]),
        turn=sequence.turn,
        prompt_checksum=sequence.prompt_checksum,
        logprobs=sequence.logprobs[before.num_tokens :] or None,
        finish_reason=sequence.finish_reason,
        error=sequence.error,
    )


class _Growing:
    """A sequence while its journal is read."""

    def __init__(self) -> None:
        self.is_known = False
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._checksum = 0
        self._prompt_checksum = 0
        self._finish_reason: FinishReason | None = None
        self._error: RowError | None = None

    def apply(self, record: JournalRecord) -> None:
        """Go back to the record's position and add what it says, unless it was written behind other tokens."""
        position = record.position
        if position > len(self._token_ids):
            return
        if position and record.prompt_checksum != self._prompt_checksum:
            return
        is_cut = position < len(self._token_ids)
        before = checksum(tokens_of(self._token_ids[:position])) if is_cut else self._checksum
        if before != record.prefix_checksum:
            return
        self.is_known = True
        self._prompt_checksum = record.prompt_checksum
        del self._token_ids[position:]
        del self._logprobs[position:]
        self._token_ids += record.token_ids.tolist()
        self._logprobs += record.logprobs or ()
        self._checksum = checksum(record.token_ids, before)
        self._finish_reason = record.finish_reason
        self._error = record.error

    def sequence(self, row_id: str, sample: int, turn: int) -> JournaledSequence:
        return JournaledSequence(
            row_id,
            sample,
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._finish_reason,
            self._error,
            turn,
            self._prompt_checksum,
        )


def _read_segments(directory: Location) -> tuple[tuple[str, ...], list[bytes | None]]:
    """Names of the segments in the order they count in, and their bytes; None for one that is gone."""
    for _ in range(_NUM_LOOKS):
        names = tuple(sorted(directory.names(), key=_order))
        with ThreadPoolExecutor(min(_READ_THREADS, max(1, len(names))), thread_name_prefix="journal") as pool:
            contents = list(pool.map(lambda name: directory.child(name).read_if_present(), names))
        if None not in contents:
            break
    return names, contents


def _order(name: str) -> tuple[str, int, int]:
    match = _SEGMENT_NAME.fullmatch(name)
    return ("", 0, 0) if match is None else (match["run"], int(match["lease"]), int(match["k"]))


def _decode(name: str, content: bytes | None, unit_id: str, fingerprint: str) -> list[JournalRecord]:
    match = _SEGMENT_NAME.fullmatch(name)
    if match is None:
        raise SegmentDamaged("no segment's name")
    if content is None:
        raise SegmentDamaged("gone")
    return decode_segment(content, SegmentOrigin(fingerprint, unit_id, match["run"], int(match["lease"])))
