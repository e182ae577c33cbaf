"""The journal of a unit in flight: whatever is lost, damaged or written by a zombie, no sequence is a mix of two."""

import logging
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import StorageUnavailable
from batchinfer.records import RowError, TokenLogprobs
from batchinfer.storage import journal
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import (
    Journal,
    JournaledSequence,
    JournalWriter,
    SequenceId,
    journaled_units,
    read_journal,
    remove_journal,
    remove_journals_except,
)
from batchinfer.storage.layout import journal_directory
from batchinfer.storage.location import Location
from batchinfer.storage.segment import checksum, tokens_of

UNIT = "0123456789abcdef-000000000-8"
OTHER_UNIT = "0123456789abcdef-000000008-8"
ROWS = [f"0123456789abcdef:{number}" for number in range(3)]
PRINT = "f" * 16
#: Runs in the order they started.
RUNS = [f"20260101T00000{number}-abcdef" for number in range(6)]


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out"))


def writer(output: Location, run: int = 0, lease: int = 1, known: Journal | None = None) -> JournalWriter:
    return JournalWriter(output, UNIT, PRINT, RUNS[run], lease, known)


def tokens(*token_ids: int, row: int = 0, **fields: object) -> JournaledSequence:
    return JournaledSequence(ROWS[row], 0, token_ids, **fields)  # type: ignore[arg-type]


def read(output: Location) -> Journal:
    return read_journal(output, UNIT, PRINT)


def segments(output: Location) -> list[Path]:
    return sorted(Path(output.uri, "_job", "journal", UNIT).glob("*.arrow"))


def found(output: Location, row: int = 0) -> JournaledSequence | None:
    return read(output).sequences.get((ROWS[row], 0, 0))


def test_what_is_read_is_what_was_written(output: Location) -> None:
    logprobs = (
        TokenLogprobs(5, -0.5, ((5, -0.5), (7, -1.25))),
        TokenLogprobs(6, -2.0),
        TokenLogprobs(7, -0.25, ((1, -4.0),)),
    )
    sequences = [
        tokens(5, 6, 7, logprobs=logprobs),
        tokens(9, row=1, finish_reason="stop"),
        JournaledSequence(ROWS[1], 1, (2**31 - 1,), (), "length"),
        JournaledSequence(ROWS[2], 0, error=RowError(ROWS[2], "out_of_memory", "too large, 한국어", 3)),
    ]
    writer(output).flush(sequences)
    assert read(output).sequences == {sequence.sequence_id: sequence for sequence in sequences}
    assert journaled_units(output) == {UNIT}


def test_only_news_is_written(output: Location) -> None:
    ours = writer(output)
    ours.flush([tokens(*range(5000)), tokens(1, row=1, finish_reason="stop")])
    first = segments(output)[0].stat().st_size
    ours.flush([tokens(*range(5000)), tokens(1, row=1, finish_reason="stop")])
    assert len(segments(output)) == 1
    ours.flush([tokens(*range(5001))])
    assert segments(output)[1].stat().st_size < first / 2
    assert found(output) == tokens(*range(5001))
    assert (ours.num_rows, ours.num_tokens) == (2, 5002)


def test_nothing_new_leaves_no_file(output: Location) -> None:
    ours = writer(output)
    ours.flush([])
    ours.flush([tokens()])
    assert journaled_units(output) == set()
    assert read(output) == Journal()


def test_old_news_and_news_of_an_ended_sequence_are_ignored(output: Location) -> None:
    ours = writer(output)
    ours.flush([tokens(1, 2, 3)])
    ours.flush([tokens(1, 2)])
    ours.flush([tokens(1, 2, 3, 4, finish_reason="stop")])
    ours.flush([tokens(1, 2, 3, 4)])
    assert found(output) == tokens(1, 2, 3, 4, finish_reason="stop")
    assert len(segments(output)) == 2


def test_a_sequence_that_was_started_over_replaces_what_was_known(output: Location) -> None:
    """An engine that cannot go on behind the tokens it was given begins anew, with other ones perhaps."""
    ours = writer(output)
    ours.flush([tokens(1, 2, 3)])
    ours.flush([tokens(7, 8)])
    assert found(output) == tokens(7, 8)
    ours.flush([tokens(7, 8, 9, 10, 11)])
    assert found(output) == tokens(7, 8, 9, 10, 11)
    ours.flush([tokens(1, 2, 3, 4, 5, 6, 7)])
    assert found(output) == tokens(1, 2, 3, 4, 5, 6, 7)


def test_a_later_holder_goes_on_and_writes_only_what_it_adds(output: Location) -> None:
    writer(output).flush([tokens(1, 2, 3), tokens(8, row=1, finish_reason="stop")])
    known = read(output)
    successor = writer(output, lease=2, known=known)
    successor.flush(list(known.sequences.values()))
    assert len(segments(output)) == 1
    successor.flush([tokens(1, 2, 3, 4)])
    assert found(output) == tokens(1, 2, 3, 4)
    assert found(output, row=1) == tokens(8, row=1, finish_reason="stop")


def test_the_later_holder_prevails_over_a_zombie_that_draws_other_tokens(output: Location) -> None:
    """1. the first holder writes 2 tokens  2. its successor goes on  3. the first, alive after all, goes on too"""
    zombie = writer(output, lease=1)
    zombie.flush([tokens(1, 2)])
    successor = writer(output, lease=2, known=read(output))
    successor.flush([tokens(1, 2, 30)])
    zombie.flush([tokens(1, 2, 3, 4, 5, 6, finish_reason="stop")])
    assert found(output) == tokens(1, 2, 30)
    successor.flush([tokens(1, 2, 30, 40)])
    assert found(output) == tokens(1, 2, 30, 40)


def test_a_record_whose_beginning_is_lost_is_not_put_behind_other_tokens(output: Location) -> None:
    """Without the checksum of what comes before, the zombie's first tokens would continue with the successor's."""
    zombie, successor = writer(output, lease=1), writer(output, lease=2)
    successor.flush([tokens(10, 20)])
    successor.flush([tokens(10, 20, 30)])
    zombie.flush([tokens(1, 2, 3, 4)])
    segments(output)[1].unlink()
    assert found(output) == tokens(1, 2, 3, 4)


def test_runs_come_before_leases(output: Location) -> None:
    writer(output, run=1, lease=1).flush([tokens(7)])
    writer(output, run=0, lease=9).flush([tokens(1, 2, 3)])
    assert found(output) == tokens(7)


def test_a_holder_that_counts_before_its_predecessor_takes_the_journal_over_whole(output: Location) -> None:
    """The former run's clock was ahead: without this, whatever the later run adds would count before it and be lost."""
    writer(output, run=5).flush([tokens(1, 2), tokens(9, row=1, finish_reason="stop")])
    later = writer(output, run=0, known=read(output))
    later.flush([tokens(1, 2, 3)])
    assert found(output) == tokens(1, 2, 3)
    assert found(output, row=1) == tokens(9, row=1, finish_reason="stop")
    assert [path.name[: len(RUNS[0])] for path in segments(output)] == [RUNS[0]]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign"])
def test_a_damaged_segment_is_named_and_left_out(
    output: Location, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = writer(output)
    ours.flush([tokens(1, 2)])
    ours.flush([tokens(1, 2, 3), tokens(5, row=1)])
    ours.flush([tokens(1, 2, 3, 4), tokens(5, 6, row=1), tokens(7, row=2)])
    path = segments(output)[1]
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "torn": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
            "empty": b"",
            "foreign": b"PAR1 and the like" * 10,
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        journal = read(output)
    assert (journal.num_segments, journal.num_damaged) == (3, 1)
    assert path.name in caplog.text
    assert journal.sequences == {(ROWS[0], 0, 0): tokens(1, 2), (ROWS[2], 0, 0): tokens(7, row=2)}


def test_a_flipped_bit_anywhere_is_noticed(output: Location) -> None:
    writer(output).flush([tokens(1, 2)])
    (path,) = segments(output)
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :]
        )
        assert read(output).num_damaged == 1, position


def test_a_journal_of_another_job_or_unit_does_not_count(output: Location, caplog: pytest.LogCaptureFixture) -> None:
    writer(output).flush([tokens(1, 2)])
    assert read_journal(output, UNIT, "another").sequences == {}
    assert "fingerprint is ffffffffffffffff instead of another" in caplog.text
    (path,) = segments(output)
    elsewhere = Path(output.uri, "_job", "journal", OTHER_UNIT)
    elsewhere.mkdir()
    path.rename(elsewhere / path.name)
    assert read_journal(output, OTHER_UNIT, PRINT).num_damaged == 1
    # A copy under another holder's name would count at another time.
    (elsewhere / path.name).rename(path.with_name(path.name.replace("-00000001-", "-00000002-")))
    assert read(output).num_damaged == 1


def test_a_journal_stays_small_in_number(output: Location) -> None:
    ours, length = writer(output), 0
    for length in range(1, 200):
        ours.flush([tokens(*range(length)), tokens(length, row=1 + length % 2, finish_reason="stop")])
        assert len(segments(output)) <= journal.MAX_SEGMENTS
        assert ours.num_segments == len(segments(output))
    assert found(output) == tokens(*range(length))
    assert found(output, row=2) == tokens(1, row=2, finish_reason="stop")


def test_a_journal_written_whole_keeps_what_former_holders_knew(output: Location) -> None:
    writer(output).flush([tokens(1), tokens(2, row=1, finish_reason="length")])
    ours = writer(output, lease=2, known=read(output))
    for length in range(2, journal.MAX_SEGMENTS + 3):
        ours.flush([tokens(*range(1, length))])
    assert all("-00000002-" in path.name for path in segments(output))
    assert found(output, row=1) == tokens(2, row=1, finish_reason="length")


class Failing:
    """Storage that refuses writes as long as it is told to; everything else goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, output: Location) -> None:
        self.fails = False
        write = type(output).write_replace

        def write_replace(location: Location, content: bytes, staging: Location) -> None:
            if self.fails:
                raise StorageUnavailable("no space left")
            write(location, content, staging)

        monkeypatch.setattr(type(output), "write_replace", write_replace)


def test_what_a_failed_flush_left_is_written_by_the_next(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Failing(monkeypatch, output)
    ours = writer(output)
    ours.flush([tokens(1)])
    storage.fails = True
    with pytest.raises(StorageUnavailable):
        ours.flush([tokens(1, 2), tokens(9, row=1, finish_reason="stop")])
    storage.fails = False
    ours.flush([tokens(1, 2, 3)])
    assert found(output) == tokens(1, 2, 3)
    assert found(output, row=1) == tokens(9, row=1, finish_reason="stop")


def test_the_journal_is_removed_with_its_directory_and_others_stay(output: Location) -> None:
    writer(output).flush([tokens(1)])
    JournalWriter(output, OTHER_UNIT, PRINT, RUNS[0], 2).flush([tokens(1)])
    remove_journal(output, UNIT)
    remove_journal(output, UNIT)
    assert journaled_units(output) == {OTHER_UNIT}
    assert not Path(output.uri, "_job", "journal", UNIT).exists()


def test_journals_of_units_that_are_done_are_swept_away(output: Location) -> None:
    writer(output).flush([tokens(1)])
    JournalWriter(output, OTHER_UNIT, PRINT, RUNS[0], 2).flush([tokens(1)])
    remove_journals_except(output, [OTHER_UNIT, "0123456789abcdef-000000016-8"])
    assert journaled_units(output) == {OTHER_UNIT}


def test_a_segment_that_goes_while_it_is_read_is_looked_for_again(
    output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a reader lists the segments  2. a zombie writes a whole one and removes them  3. the reader looks again"""
    zombie = writer(output)
    for length in range(1, journal.MAX_SEGMENTS + 1):
        zombie.flush([tokens(*range(length))])
    names = type(output).names
    looks: list[int] = []

    def names_then_zombie(location: Location) -> set[str]:
        listed = names(location)
        if not looks:
            zombie.flush([tokens(*range(100))])
        looks.append(len(listed))
        return listed

    monkeypatch.setattr(type(output), "names", names_then_zombie)
    assert found(output) == tokens(*range(100))
    assert looks[:2] == [journal.MAX_SEGMENTS, 1]


def in_memory() -> Location:
    """An empty output in a store without directories; the one of the call before is forgotten."""
    output = locate("memory://journal-tests/out")
    remove_journal(output, UNIT)
    return output


def test_an_object_store_without_directories_serves_as_well() -> None:
    output = in_memory()
    assert read(output) == Journal()
    ours = writer(output)
    for length in range(1, journal.MAX_SEGMENTS + 5):
        ours.flush([tokens(*range(length))])
    assert journaled_units(output) == {UNIT}
    assert found(output) == tokens(*range(journal.MAX_SEGMENTS + 4))
    assert read(output).num_segments < 6
    remove_journals_except(output, [])
    assert journaled_units(output) == set()
    assert read(output) == Journal()


class World:
    """Holders of one unit, some of them zombies, and every sequence that each of them ever had.

    Tokens come from the holder: one that does not take over what was read draws others than any before it. Where a
    row's first turn has ended a second one follows, with a prompt that is made of the first one's tokens.
    """

    def __init__(self, output: Location, choices: random.Random) -> None:
        self._output = output
        self._choices = choices
        self._holders: list[tuple[JournalWriter, dict[SequenceId, JournaledSequence]]] = []
        self.histories: dict[SequenceId, set[JournaledSequence]] = defaultdict(set)
        self._num_tokens = 0

    def take_over(self) -> Journal:
        """The next holder reads the journal and goes on from it."""
        known = read(self._output)
        number = len(self._holders)
        # Now and then the next run's clock is behind.
        run = self._choices.choice([number // 2, number // 2, number % 3])
        state = dict(known.sequences)
        self._holders.append((writer(self._output, run % len(RUNS), number, known), state))
        return known

    def flush(self) -> None:
        """Any holder, the present one more often, generates something and writes it."""
        late = self._choices.random() < 0.3
        journal_writer, state = self._choices.choice(self._holders) if late else self._holders[-1]
        for row in self._choices.sample(ROWS, self._choices.randint(1, len(ROWS))):
            first = state[row, 0, 0] = self._grown(state.get((row, 0, 0), JournaledSequence(row, 0)))
            if first.has_ended:
                prompt = checksum(tokens_of(first.token_ids))
                second = state.get((row, 0, 1))
                if second is None or second.prompt_checksum != prompt:
                    second = JournaledSequence(row, 0, turn=1, prompt_checksum=prompt)
                state[row, 0, 1] = self._grown(second)
        journal_writer.flush(self._choices.sample(list(state.values()), len(state)))

    def _grown(self, sequence: JournaledSequence) -> JournaledSequence:
        if sequence.has_ended:
            return sequence
        grown = sequence
        for _ in range(self._choices.randint(0, 3)):
            self._num_tokens += 1
            grown = replace(grown, token_ids=(*grown.token_ids, self._num_tokens))
            self.histories[grown.sequence_id].add(grown)
        if self._choices.random() < 0.1:
            grown = replace(grown, finish_reason="stop")
        self.histories[grown.sequence_id].add(grown)
        return grown

    def damage(self) -> None:
        """One segment is lost, torn or changed."""
        directory = journal_directory(self._output, UNIT)
        names = sorted(directory.names())
        if not names:
            return
        segment = directory.child(self._choices.choice(names))
        content = segment.read_bytes()
        match self._choices.randrange(3):
            case 0:
                segment.remove()
            case 1:
                segment.write_replace(content[: self._choices.randrange(len(content) + 1)], directory)
            case 2:
                segment.write_replace(content[::-1], directory)


def test_a_turn_counts_behind_its_own_prompt_only(output: Location) -> None:
    """1. two holders end the first turn differently  2. the zombie writes a second turn  3. the later one does, too"""
    zombie, ours = writer(output, run=0), writer(output, run=1)
    zombie.flush([tokens(1, 2, finish_reason="stop"), tokens(7, 8, turn=1, prompt_checksum=12)])
    ours.flush([tokens(1, 3, finish_reason="stop")])
    second = (ROWS[0], 0, 1)
    # Whoever reads it sees that its prompt is another one than the first turn's tokens make.
    assert read(output).sequences[second] == tokens(7, 8, turn=1, prompt_checksum=12)
    ours.flush([tokens(7, turn=1, prompt_checksum=13)])
    assert read(output).sequences[second] == tokens(7, turn=1, prompt_checksum=13)
    zombie.flush([tokens(7, 8, 9, turn=1, prompt_checksum=12)])
    assert read(output).sequences[second] == tokens(7, turn=1, prompt_checksum=13)
    successor = writer(output, run=2, known=read(output))
    successor.flush([tokens(7, turn=1, prompt_checksum=14, finish_reason="stop")])
    assert read(output).sequences[second] == tokens(7, turn=1, prompt_checksum=14, finish_reason="stop")


def test_a_turn_is_not_gone_on_with_behind_equal_tokens_of_another_prompt(output: Location) -> None:
    """1. two holders' second turns begin alike by chance  2. the segment that tells them apart is lost"""
    former, later = writer(output, run=0), writer(output, run=1)
    former.flush([tokens(7, 8, turn=1, prompt_checksum=12)])
    later.flush([tokens(7, 8, turn=1, prompt_checksum=13)])
    segments(output)[1].unlink()
    later.flush([tokens(7, 8, 9, turn=1, prompt_checksum=13)])
    assert read(output).sequences == {(ROWS[0], 0, 1): tokens(7, 8, turn=1, prompt_checksum=12)}


def _check_histories(found: Iterable[JournaledSequence], world: World) -> None:
    for sequence in found:
        assert sequence in world.histories[sequence.sequence_id], f"{sequence} was never any holder's"


@given(st.integers(0, 2**32))
def test_whatever_happens_a_sequence_read_is_one_that_some_holder_had(seed: int) -> None:
    """Every token is drawn once, so a mix of two holders' tokens would be nobody's history."""
    output = in_memory()
    choices = random.Random(seed)
    world = World(output, choices)
    world.take_over()
    for _ in range(choices.randint(1, 25)):
        happening = choices.random()
        if happening < 0.7:
            world.flush()
        elif happening < 0.85:
            _check_histories(world.take_over().sequences.values(), world)
        else:
            world.damage()
    _check_histories(read(output).sequences.values(), world)


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_without_damage_nothing_that_the_present_holder_wrote_is_lost(seed: int) -> None:
    """Holders follow each other without zombies: each reads all that was written before it."""
    output = in_memory()
    choices = random.Random(seed)
    expected: dict[SequenceId, JournaledSequence] = {}
    for lease in range(choices.randint(1, 4)):
        known = read(output)
        assert known.sequences == expected
        ours = writer(output, choices.randrange(len(RUNS)), lease, known)
        for _ in range(choices.randint(1, 40)):
            row = choices.choice(ROWS)
            before = expected.get((row, 0, 0), JournaledSequence(row, 0))
            if before.has_ended:
                continue
            grown = replace(before, token_ids=(*before.token_ids, *(choices.randrange(9) for _ in range(3))))
            expected[row, 0, 0] = grown if choices.random() < 0.95 else replace(grown, finish_reason="length")
            ours.flush([expected[row, 0, 0]])
    assert read(output).sequences == expected
