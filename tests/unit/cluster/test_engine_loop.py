"""The desk in front of the engine: many threads wait, one drives, everybody gets their own back."""

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from batchinfer.cluster.engine_loop import EngineClosed, EngineFailed, EngineLoop, Snapshot
from batchinfer.engine.engine import Generation, Partial, Sequence
from batchinfer.engine.fake import FakeBehaviour, FakeEngine, FakeEngineFault
from batchinfer.records import Conversation, Prompt, RowError, SamplingParams


def sequences(unit: str, count: int, max_new_tokens: int = 4) -> list[Sequence]:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return [Sequence(Prompt(f"{unit}:{index}", (1, 2, index), sampling)) for index in range(count)]


class GatedEngine(FakeEngine):
    """A fake engine whose steps wait for :meth:`open`; remembers which units each step finished rows of."""

    def __init__(self, capacity: int = 256) -> None:
        super().__init__(capacity=capacity)
        self._gate = threading.Event()
        self._stepping = threading.Event()
        self.units_of_steps: list[set[str]] = []
        self.threads: set[int] = set()
        self.closed = False

    def wait_for_step(self) -> None:
        """Until the loop is inside a step: what arrives from now on is taken together before the next one."""
        assert self._stepping.wait(10)

    def open(self) -> None:
        self._gate.set()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        self.threads.add(threading.get_ident())
        super().submit(sequences)

    def step(self) -> list[Generation]:
        self._stepping.set()
        assert self._gate.wait(10)
        self.threads.add(threading.get_ident())
        finished = super().step()
        self.units_of_steps.append({gen.sequence.prompt.row_id.partition(":")[0] for gen in finished})
        return finished

    def close(self) -> None:
        super().close()
        self.closed = True


def wait_for_queued(loop: EngineLoop, count: int) -> None:
    """Until so many calls lie in the loop's inbox while its thread is inside a step."""
    deadline_s = time.monotonic() + 10
    while loop._inbox.qsize() < count:
        assert time.monotonic() < deadline_s


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_every_thread_gets_its_own_generations_back(threads: ThreadPoolExecutor) -> None:
    loop = EngineLoop(FakeEngine(capacity=7))
    waiting: dict[str, Future[list[Generation]]] = {
        unit: threads.submit(loop.generate, sequences(unit, 50)) for unit in "abcdef"
    }
    for unit, answer in waiting.items():
        found = sorted(gen.sequence.prompt.row_id for gen in answer.result(10))
        assert found == sorted(f"{unit}:{index}" for index in range(50))
    loop.close()


def test_sequences_of_several_units_share_a_step_and_one_thread_drives(threads: ThreadPoolExecutor) -> None:
    engine = GatedEngine()
    loop = EngineLoop(engine)
    first = threads.submit(loop.generate, sequences("a", 3))
    engine.wait_for_step()
    others = [threads.submit(loop.generate, sequences(unit, 3)) for unit in "bc"]
    wait_for_queued(loop, 2)
    engine.open()
    for answer in (first, *others):
        assert len(answer.result(10)) == 3
    assert engine.units_of_steps == [{"a"}, {"b", "c"}]
    assert len(engine.threads) == 1
    assert engine.threads != {threading.get_ident()}
    loop.close()


def test_a_unit_waits_for_its_slowest_row_only(threads: ThreadPoolExecutor) -> None:
    """With room for two rows, the small unit ends while the large one is still going."""
    engine = GatedEngine(capacity=2)
    loop = EngineLoop(engine)
    small = threads.submit(loop.generate, sequences("small", 2))
    engine.wait_for_step()
    large = threads.submit(loop.generate, sequences("large", 6))
    engine.open()
    assert len(small.result(10)) == 2
    assert len(large.result(10)) == 6
    assert engine.units_of_steps[0] == {"small"}
    loop.close()


def test_nothing_to_generate_is_answered_at_once() -> None:
    engine = GatedEngine()
    loop = EngineLoop(engine)
    assert loop.generate([]) == []
    loop.close()
    assert engine.units_of_steps == []


def test_an_engine_that_raises_fails_every_waiting_caller_and_later_ones(threads: ThreadPoolExecutor) -> None:
    class Broken(GatedEngine):
        def step(self) -> list[Generation]:
            super().step()
            raise RuntimeError("CUDA error: device-side assert")

    engine = Broken()
    loop = EngineLoop(engine)
    first = threads.submit(loop.generate, sequences("a", 3))
    engine.wait_for_step()
    # This one is still in the inbox when the engine breaks.
    second = threads.submit(loop.generate, sequences("b", 3))
    wait_for_queued(loop, 1)
    engine.open()
    for answer in (first, second):
        with pytest.raises(EngineFailed, match="device-side assert") as raised:
            answer.result(10)
        assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(EngineFailed, match="device-side assert"):
        loop.generate(sequences("c", 1))
    assert isinstance(loop.failure, RuntimeError)
    loop.close()
    assert engine.closed


def test_an_engine_that_cannot_take_sequences_fails_their_caller() -> None:
    class Refusing(FakeEngine):
        def submit(self, sequences: Iterable[Sequence]) -> None:
            raise MemoryError("no room")

    loop = EngineLoop(Refusing())
    with pytest.raises(EngineFailed, match="no room"):
        loop.generate(sequences("a", 1))
    loop.close()


def test_the_fault_of_the_fake_engine_arrives_as_itself() -> None:
    loop = EngineLoop(FakeEngine(FakeBehaviour(error_rate=1.0)))
    with pytest.raises(EngineFailed) as raised:
        loop.generate(sequences("a", 1))
    assert isinstance(raised.value.__cause__, FakeEngineFault)
    loop.close()


def test_close_wakes_waiters_and_refuses_later_ones(threads: ThreadPoolExecutor) -> None:
    engine = GatedEngine(capacity=1)
    loop = EngineLoop(engine)
    waiting = threads.submit(loop.generate, sequences("a", 3))
    engine.wait_for_step()
    closing = threads.submit(loop.close)
    wait_for_queued(loop, 1)
    engine.open()
    closing.result(10)
    with pytest.raises(EngineClosed):
        waiting.result(10)
    with pytest.raises(EngineClosed):
        loop.generate(sequences("b", 1))
    assert loop.failure is None
    assert engine.closed
    assert not loop._thread.is_alive()


def test_close_may_be_called_twice() -> None:
    loop = EngineLoop(FakeEngine())
    loop.close()
    loop.close()


def test_progress_can_be_asked_for_while_the_engine_idles_and_while_it_works(threads: ThreadPoolExecutor) -> None:
    engine = GatedEngine()
    loop = EngineLoop(engine)
    assert loop.stats().num_finished == 0
    assert loop.failure is None
    waiting = threads.submit(loop.generate, sequences("a", 4))
    engine.wait_for_step()
    assert loop.stats().num_waiting == 4
    engine.open()
    waiting.result(10)
    assert loop.stats().num_finished == 4
    assert loop.stats().num_prompt_tokens == 12
    loop.close()


def slow(tokens_per_step: int) -> FakeEngine:
    """A fake engine that takes its rows a few tokens further with each step, at once."""
    return FakeEngine(FakeBehaviour(tokens_per_s=tokens_per_step * 20), sleep=lambda seconds: None)


def long_sequences(unit: str, count: int) -> list[Sequence]:
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
    return [Sequence(Prompt(f"{unit}:{index}", (1, 2, index), sampling)) for index in range(count)]


def test_every_caller_is_told_of_its_own_ends_once_and_of_how_far_the_others_are(threads: ThreadPoolExecutor) -> None:
    loop = EngineLoop(slow(40), snapshot_interval_s=0.0)
    told: dict[str, list[Snapshot]] = {"a": [], "b": []}
    answers = {
        unit: threads.submit(loop.generate, long_sequences(unit, 20), snapshots.append)
        for unit, snapshots in told.items()
    }
    for unit, answer in answers.items():
        generations = answer.result(10)
        ended = [generation for snapshot in told[unit] for generation in snapshot.ended]
        # The last ones come with the answer itself.
        assert 0 < len(ended) < len(generations)
        assert ended == generations[: len(ended)]
        for snapshot in told[unit]:
            assert {partial.sequence.prompt.row_id[0] for partial in snapshot.in_progress} <= {unit}
            assert all(0 < len(partial.token_ids) < 40 for partial in snapshot.in_progress)
        assert any(snapshot.in_progress for snapshot in told[unit])
    loop.close()


def test_work_that_ends_within_the_interval_is_told_of_by_its_end_alone() -> None:
    loop = EngineLoop(slow(40), snapshot_interval_s=60.0)
    told: list[Snapshot] = []
    assert len(loop.generate(long_sequences("a", 5), told.append)) == 5
    assert told == []
    loop.close()


def test_before_a_failure_leaves_its_caller_knows_what_had_ended() -> None:
    class Dying(FakeEngine):
        def step(self) -> list[Generation]:
            if self.stats().num_finished >= 3:
                raise RuntimeError("CUDA error")
            return super().step()

    loop = EngineLoop(Dying(capacity=1), snapshot_interval_s=60.0)
    told: list[Snapshot] = []
    with pytest.raises(EngineFailed):
        loop.generate(sequences("a", 5), told.append)
    assert [len(snapshot.ended) for snapshot in told] == [3]
    loop.close()


def test_a_close_tells_of_everything_up_to_the_step_it_waited_for(threads: ThreadPoolExecutor) -> None:
    class Gated(FakeEngine):
        def __init__(self) -> None:
            super().__init__(FakeBehaviour(tokens_per_s=400.0), sleep=lambda seconds: None)
            self.stepping, self.gate = threading.Event(), threading.Event()

        def step(self) -> list[Generation]:
            self.stepping.set()
            assert self.gate.wait(10)
            return super().step()

    engine = Gated()
    loop = EngineLoop(engine, snapshot_interval_s=60.0)
    told: list[Snapshot] = []
    waiting = threads.submit(loop.generate, long_sequences("a", 3), told.append)
    assert engine.stepping.wait(10)
    closing = threads.submit(loop.close)
    wait_for_queued(loop, 1)
    engine.gate.set()
    closing.result(10)
    with pytest.raises(EngineClosed):
        waiting.result(10)
    assert sum(len(partial.token_ids) for partial in told[0].in_progress) == 20
    assert len(told) == 1


def test_a_close_does_not_wait_longer_for_a_step_than_it_may(threads: ThreadPoolExecutor) -> None:
    """1. a step hangs  2. the close gives up waiting for it, callers are woken  3. what the step brings is dropped"""
    engine = GatedEngine()
    loop = EngineLoop(engine, snapshot_interval_s=0.0)
    told: list[Snapshot] = []
    waiting = threads.submit(loop.generate, sequences("a", 3), told.append)
    engine.wait_for_step()
    loop.close(timeout_s=0.05)
    with pytest.raises(EngineClosed):
        waiting.result(10)
    with pytest.raises(EngineClosed):
        loop.generate(sequences("b", 1))
    engine.open()
    loop._thread.join(10)
    assert not loop._thread.is_alive()
    assert engine.closed
    assert told == []


def test_partials_that_cannot_be_had_do_not_hide_what_ended() -> None:
    class Broken(FakeEngine):
        def in_progress(self) -> list[Partial]:
            raise RuntimeError("CUDA error")

    loop = EngineLoop(Broken(capacity=1), snapshot_interval_s=0.0)
    told: list[Snapshot] = []
    with pytest.raises(EngineFailed):
        loop.generate(sequences("a", 5), told.append)
    assert [len(snapshot.ended) for snapshot in told] == [1]
    loop.close()


def test_time_without_work_is_counted_and_time_with_it_is_not(threads: ThreadPoolExecutor) -> None:
    engine = GatedEngine()
    loop = EngineLoop(engine)
    time.sleep(0.05)
    assert sum(loop.idle_clock.seconds().values()) >= 0.05
    waiting = threads.submit(loop.generate, sequences("a", 1))
    engine.wait_for_step()
    busy = loop.idle_clock.seconds()
    time.sleep(0.05)
    assert loop.idle_clock.seconds() == busy
    engine.open()
    waiting.result(10)
    loop.close()


def conversations(unit: str, count: int, num_turns: int) -> list[Sequence]:
    conversation = Conversation(("?",) * num_turns, SamplingParams(max_new_tokens=4))
    return [
        replace(sequence, prompt=replace(sequence.prompt, conversation=conversation))
        for sequence in sequences(unit, count)
    ]


def next_turn(end: Generation) -> Sequence:
    prompt = end.sequence.prompt
    assert prompt.conversation is not None
    longer = replace(prompt.conversation, answers=(*prompt.conversation.answers, "!"))
    return Sequence(replace(prompt, token_ids=(*prompt.token_ids, *end.token_ids, 9), conversation=longer))


def turns_of(ends: Iterable[Generation]) -> list[tuple[str, int]]:
    return sorted((end.sequence.prompt.row_id, end.sequence.turn) for end in ends)


class Conversing(FakeEngine):
    """Remembers whose next turns were called off."""

    def __init__(self, capacity: int = 256) -> None:
        super().__init__(capacity=capacity)
        self.called_off: list[tuple[str, int]] = []

    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        self.called_off += sequence_ids


def test_every_turn_follows_the_one_before_it_and_all_are_returned(threads: ThreadPoolExecutor) -> None:
    loop = EngineLoop(FakeEngine(capacity=3))
    followers: set[str] = set()

    def follow_up(end: Generation) -> Sequence:
        followers.add(threading.current_thread().name.partition("_")[0])
        return next_turn(end)

    answers = {
        unit: threads.submit(loop.generate, conversations(unit, 5, num_turns), lambda snapshot: None, follow_up)
        for unit, num_turns in (("a", 1), ("b", 2), ("c", 4))
    }
    for (unit, answer), num_turns in zip(answers.items(), (1, 2, 4), strict=True):
        expected = [(f"{unit}:{row}", turn) for row in range(5) for turn in range(num_turns)]
        assert turns_of(answer.result(10)) == expected
    assert followers == {"turns"}, "neither on the engine's thread nor on the caller's"
    loop.close()


class SlowNextTurn:
    """The next turn, once the test lets it come."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def __call__(self, end: Generation) -> Sequence:
        self.asked.set()
        assert self.may_answer.wait(10)
        return next_turn(end)


def test_the_engine_goes_on_while_a_next_turn_is_made(threads: ThreadPoolExecutor) -> None:
    """1. a's only conversation is between two turns  2. b is generated all the same  3. a goes on"""
    loop = EngineLoop(FakeEngine())
    slow = SlowNextTurn()
    first = threads.submit(loop.generate, conversations("a", 1, 2), lambda snapshot: None, slow)
    assert slow.asked.wait(10)
    assert len(loop.generate(sequences("b", 3))) == 3
    assert not first.done()
    slow.may_answer.set()
    assert turns_of(first.result(10)) == [("a:0", 0), ("a:0", 1)]
    loop.close()


def test_a_turn_that_cannot_be_asked_ends_its_conversation_and_no_other() -> None:
    engine = Conversing()
    loop = EngineLoop(engine)

    def refuse_first_row(end: Generation) -> Sequence | Generation:
        following = next_turn(end)
        if end.sequence.prompt.row_id != "a:0":
            return following
        return Generation(following, (), "length", error=RowError("a:0", "too_long", "turn 2 of 3: too long"))

    ends = loop.generate(conversations("a", 3, 3), follow_up=refuse_first_row)
    assert turns_of(ends) == [("a:0", 0), ("a:0", 1), *((f"a:{row}", turn) for row in (1, 2) for turn in range(3))]
    assert [end.error.error_type for end in ends if end.error is not None] == ["too_long"]
    assert loop.generate(sequences("b", 1)), "the engine has seen to all that came before"
    assert engine.called_off == [("a:0", 0)]
    loop.close()


def test_a_follow_up_that_raises_fails_its_caller_alone_once_nothing_of_it_is_in_the_engine() -> None:
    engine = Conversing(capacity=1)
    loop = EngineLoop(engine)

    def broken(end: Generation) -> Sequence:
        raise ZeroDivisionError("a mistake of ours")

    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        loop.generate(conversations("a", 3, 2), follow_up=broken)
    assert engine.num_unfinished == 0
    # So the unit may be tried again here, under the same ids.
    assert len(loop.generate(conversations("a", 3, 2), follow_up=next_turn)) == 6
    loop.close()


def test_a_close_between_two_turns_tells_of_those_that_ended(threads: ThreadPoolExecutor) -> None:
    loop = EngineLoop(FakeEngine(), snapshot_interval_s=60.0)
    slow = SlowNextTurn()
    told: list[Snapshot] = []
    waiting = threads.submit(loop.generate, conversations("a", 1, 2), told.append, slow)
    assert slow.asked.wait(10)
    loop.close()
    with pytest.raises(EngineClosed):
        waiting.result(10)
    slow.may_answer.set()
    assert [turns_of(snapshot.ended) for snapshot in told] == [[("a:0", 0)]]


def test_an_engine_that_breaks_between_two_turns_of_a_caller_fails_it(threads: ThreadPoolExecutor) -> None:
    class Breaking(FakeEngine):
        def submit(self, sequences: Iterable[Sequence]) -> None:
            batch = list(sequences)
            if any(sequence.prompt.row_id.startswith("b") for sequence in batch):
                raise RuntimeError("CUDA error")
            super().submit(batch)

    loop = EngineLoop(Breaking())
    slow = SlowNextTurn()
    told: list[Snapshot] = []
    waiting = threads.submit(loop.generate, conversations("a", 1, 2), told.append, slow)
    assert slow.asked.wait(10)
    with pytest.raises(EngineFailed, match="CUDA error"):
        loop.generate(sequences("b", 1))
    with pytest.raises(EngineFailed, match="CUDA error"):
        waiting.result(10)
    slow.may_answer.set()
    assert [turns_of(snapshot.ended) for snapshot in told] == [[("a:0", 0)]]
    loop.close()


def test_snapshots_keep_coming_where_the_engine_idles_between_turns() -> None:
    """One conversation alone: each of its turns is over at once, all of them together are not."""
    loop = EngineLoop(FakeEngine(), snapshot_interval_s=0.05)
    told: list[Snapshot] = []

    def slow(end: Generation) -> Sequence:
        time.sleep(0.03)
        return next_turn(end)

    assert len(loop.generate(conversations("a", 1, 8), told.append, slow)) == 8
    assert sum(len(snapshot.ended) for snapshot in told) > 3
    loop.close()
