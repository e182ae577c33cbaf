"""A unit that was interrupted: what its journal knows is not generated again, and the part comes out the same."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.engine_loop import EngineClosed, EngineFailed, EngineLoop
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import Assignment, Drained, ProbeResult
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import KILLED_REPLICA, UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Generation
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.errors import StorageUnavailable
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.planner import plan_input
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.spec import PromptSpec, SamplingSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import JournaledSequence, JournalWriter, journaled_units, read_journal
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat
from tests.jobs import model_without_weights
from tests.tiny import EOS_TOKEN_ID, VOCAB_SIZE

SCHEMA = pa.schema({"id": pa.int64(), "prompt": pa.string()})
PRINT = "f" * 16
NUM_ROWS = 12
NUM_TOKENS = 40


class StepwiseEngine(FakeEngine):
    """Takes four rows at a time ten tokens further per step, without waiting; breaks or stands still when told to."""

    def __init__(self, *, breaks_after: int | None = None, stands_after: int | None = None, poison: int | None = None):
        behaviour = FakeBehaviour(tokens_per_s=800.0, poison_token_id=poison)
        super().__init__(behaviour, vocab_size=VOCAB_SIZE, reserved=4, sleep=lambda seconds: None, crash=self._refuse)
        self._breaks_after = breaks_after
        self._stands_after = stands_after
        self.stands = threading.Event()
        self.go_on = threading.Event()

    def step(self) -> list[Generation]:
        num_steps = self.stats().num_steps
        if num_steps == self._breaks_after:
            raise RuntimeError("CUDA error")
        if num_steps == self._stands_after:
            self.stands.set()
            assert self.go_on.wait(20)
        return super().step()

    @staticmethod
    def _refuse(status: int) -> object:
        raise AssertionError("the poison row was generated")

    @property
    def num_tokens(self) -> int:
        return self.stats().num_completion_tokens


class Replica:
    """A pipeline with an engine of its own over a shard and an output that others have, too."""

    def __init__(self, world: "World", engine: StepwiseEngine, run_id: str, interval_s: float) -> None:
        self.engine = engine
        self.loop = EngineLoop(engine, interval_s)
        output = locate(str(world.output))
        self.pipeline = UnitPipeline(
            reader=ParquetReader(partial(locate), SCHEMA),
            renderer=PromptRenderer(
                PromptSpec(text="prompt"),
                world.sampling,
                world.detokenizer._tokenizer,
                max_model_len=128,
                vocab_size=VOCAB_SIZE,
            ),
            engine_loop=self.loop,
            texts=Texts(world.detokenizer, frozenset({EOS_TOKEN_ID})),
            output=output,
            part=PartFormat(
                fingerprint=PRINT, run_id=run_id, columns=("id",), n=world.sampling.n, token_ids=True, logprobs=True
            ),
            journals=JournalKeeper(output, PRINT, run_id),
        )


class World:
    """One unit of twelve rows of forty tokens, and where its part and its journal come to lie."""

    def __init__(self, directory: Path, detokenizer: Detokenizer, **sampling: object) -> None:
        self.detokenizer = detokenizer
        self.output = directory / "out"
        self.sampling = SamplingSpec.model_validate({"max_new_tokens": NUM_TOKENS, "ignore_eos": True, **sampling})
        self._replicas: list[Replica] = []
        inputs = directory / "in"
        inputs.mkdir()
        table = pa.table({"id": range(NUM_ROWS), "prompt": [f"prompt {k}" for k in range(NUM_ROWS)]}, schema=SCHEMA)
        pq.write_table(table, inputs / "shard.parquet")
        plan = plan_input([str(inputs)], None, 1000).plan
        self.unit, self.shard = plan.units[0], plan.shards[0]

    def assignment(self, lease: int = 1, **fields: object) -> Assignment:
        return Assignment(self.unit, self.shard, 1, lease, **fields)  # type: ignore[arg-type]

    def replica(self, engine: StepwiseEngine, *, run_id: str = "run", interval_s: float = 0.0) -> Replica:
        self._replicas.append(Replica(self, engine, run_id, interval_s))
        return self._replicas[-1]

    def close(self) -> None:
        for replica in self._replicas:
            replica.loop.close()

    def rows(self) -> list[dict[str, object]]:
        (part,) = (self.output / "completions").iterdir()
        return pq.read_table(part).to_pylist()

    def dead_letters(self) -> list[dict[str, object]]:
        return pq.read_table(self.output / "errors").to_pylist()

    def has_journal(self) -> bool:
        return self.unit.unit_id in journaled_units(locate(str(self.output)))

    def num_journaled_tokens(self) -> int:
        journal = read_journal(locate(str(self.output)), self.unit.unit_id, PRINT)
        return sum(len(sequence.token_ids) for sequence in journal.sequences.values())


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return Detokenizer(load_tokenizer(model_without_weights(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def world(tmp_path: Path, detokenizer: Detokenizer) -> Iterator[World]:
    made = World(tmp_path, detokenizer)
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def undisturbed(tmp_path: Path, detokenizer: Detokenizer) -> list[dict[str, object]]:
    (tmp_path / "quiet").mkdir()
    quiet = World(tmp_path / "quiet", detokenizer)
    quiet.replica(StepwiseEngine()).pipeline.run(quiet.assignment())
    quiet.close()
    return quiet.rows()


@pytest.mark.parametrize("num_steps", [1, 5, 11])
def test_not_a_token_is_generated_twice_after_an_engine_broke(
    world: World, undisturbed: list[dict[str, object]], num_steps: int
) -> None:
    """Rows in progress and rows that ended, both journaled after the last step that gave something."""
    first = world.replica(StepwiseEngine(breaks_after=num_steps))
    with pytest.raises(EngineFailed):
        first.pipeline.run(world.assignment())
    assert first.engine.stats().num_completion_tokens == 40 * num_steps
    second = world.replica(StepwiseEngine())
    result = second.pipeline.run(world.assignment(lease=2))
    assert second.engine.stats().num_completion_tokens == NUM_ROWS * NUM_TOKENS - 40 * num_steps
    assert world.rows() == undisturbed
    assert result.num_completion_tokens == NUM_ROWS * NUM_TOKENS
    assert not world.has_journal()


def test_samples_and_their_log_probabilities_are_resumed_too(tmp_path: Path, detokenizer: Detokenizer) -> None:
    parts = []
    for name, breaks in (("quiet", []), ("broken", [3, 8, 2])):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name, detokenizer, n=2, temperature=1.0, logprobs=3)
        for lease, num_steps in enumerate(breaks):
            with pytest.raises(EngineFailed):
                world.replica(StepwiseEngine(breaks_after=num_steps)).pipeline.run(world.assignment(lease))
        last = world.replica(StepwiseEngine())
        last.pipeline.run(world.assignment(lease=9))
        assert last.engine.stats().num_completion_tokens == 2 * NUM_ROWS * NUM_TOKENS - 40 * sum(breaks)
        parts.append(world.rows())
        world.close()
    assert parts[0] == parts[1]


def test_a_unit_that_ends_before_its_first_flush_writes_no_journal(world: World) -> None:
    world.replica(StepwiseEngine(), interval_s=60.0).pipeline.run(world.assignment())
    assert len(world.rows()) == NUM_ROWS
    assert not (world.output / "_job" / "journal").exists()


def test_the_journal_goes_with_the_commit_and_when_the_unit_was_committed_before(world: World) -> None:
    """1. a replica journals and stands still  2. another commits the unit  3. the first one is through"""
    slow = world.replica(StepwiseEngine(stands_after=3))
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(slow.pipeline.run, world.assignment(lease=1))
        assert slow.engine.stands.wait(10)
        fast = world.replica(StepwiseEngine())
        assert not fast.pipeline.run(world.assignment(lease=2)).already_committed
        slow.engine.go_on.set()
        assert late.result(10).already_committed
    assert not world.has_journal()


def test_a_journal_that_cannot_be_written_costs_the_unit_nothing(
    world: World,
    undisturbed: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_space(self: JournalWriter, sequences: object) -> None:
        raise StorageUnavailable("no space left")

    monkeypatch.setattr(JournalWriter, "flush", no_space)
    world.replica(StepwiseEngine()).pipeline.run(world.assignment())
    assert world.rows() == undisturbed
    assert "no space left" in caplog.text


def test_a_commit_that_fails_leaves_the_whole_unit_in_its_journal(
    world: World, undisturbed: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("batchinfer.cluster.unit_pipeline.publish_unit", raising(StorageUnavailable("503")))
        with pytest.raises(StorageUnavailable):
            world.replica(StepwiseEngine(), interval_s=60.0).pipeline.run(world.assignment())
    second = world.replica(StepwiseEngine())
    second.pipeline.run(world.assignment(lease=2))
    assert second.engine.stats().num_completion_tokens == 0
    assert world.rows() == undisturbed


def wait_until(happened: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until_s
        time.sleep(0.001)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_a_journal_of_another_job_is_not_resumed_from(world: World, undisturbed: list[dict[str, object]]) -> None:
    other = JournalWriter(locate(str(world.output)), world.unit.unit_id, "another", "run", 1)
    other.flush([JournaledSequence(world.unit.row_id(0), 0, (9, 9, 9))])
    world.replica(StepwiseEngine()).pipeline.run(world.assignment(lease=2))
    assert world.rows() == undisturbed
    assert not world.has_journal()


def test_a_probe_generates_and_journals_its_rows_alone(world: World, undisturbed: list[dict[str, object]]) -> None:
    prober = world.replica(StepwiseEngine(), interval_s=60.0)
    assignment = world.assignment(offsets=range(3, 8))
    assert prober.pipeline.probe(assignment) == ProbeResult(world.unit.unit_id, range(3, 8))
    assert prober.engine.stats().num_completion_tokens == world.num_journaled_tokens() == 5 * NUM_TOKENS
    assert not (world.output / "completions").exists()
    second = world.replica(StepwiseEngine())
    second.pipeline.run(world.assignment(lease=2))
    assert second.engine.stats().num_completion_tokens == (NUM_ROWS - 5) * NUM_TOKENS
    assert world.rows() == undisturbed


def test_a_probe_that_cannot_be_journaled_has_failed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JournalWriter, "flush", raising(StorageUnavailable("no space left")))
    with pytest.raises(StorageUnavailable):
        world.replica(StepwiseEngine()).pipeline.probe(world.assignment(offsets=range(2)))


def test_poisoned_rows_become_dead_letters_unseen_by_the_engine(
    world: World, undisturbed: list[dict[str, object]]
) -> None:
    poison = world.detokenizer._tokenizer("prompt 7")["input_ids"][-1]
    others = {
        token for k in range(NUM_ROWS) if k != 7 for token in world.detokenizer._tokenizer(f"prompt {k}")["input_ids"]
    }
    assert poison not in others
    replica = world.replica(StepwiseEngine(poison=poison))
    result = replica.pipeline.run(world.assignment(poisoned=(7,)))
    assert world.rows() == [row for row in undisturbed if row["id"] != 7]
    (letter,) = world.dead_letters()
    assert (letter["id"], letter["error_type"]) == (7, KILLED_REPLICA)
    assert "twice" in str(letter["error"])
    assert result.dead_letters_by_type == {KILLED_REPLICA: 1}


def test_a_drained_replica_journals_everything_and_publishes_nothing(
    world: World, undisturbed: list[dict[str, object]], threads: ThreadPoolExecutor
) -> None:
    engine = StepwiseEngine(stands_after=6)
    replica = world.replica(engine, interval_s=60.0)
    running = threads.submit(replica.pipeline.run, world.assignment())
    assert engine.stands.wait(10)
    draining = threads.submit(replica.pipeline.drain, 5.0)
    wait_until(lambda: replica.loop._inbox.qsize() == 1)
    engine.go_on.set()
    # The step that was going on is part of it: six rows of forty tokens, four of ten.
    assert draining.result(10) == Drained(num_rows_journaled=8, num_tokens_journaled=280)
    with pytest.raises(EngineClosed):
        running.result(10)
    assert not (world.output / "completions").exists()
    successor = world.replica(StepwiseEngine(), run_id="run2")
    successor.pipeline.run(world.assignment())
    assert successor.engine.stats().num_completion_tokens == NUM_ROWS * NUM_TOKENS - 280
    assert world.rows() == undisturbed


def test_a_drain_does_not_wait_for_a_step_that_hangs(world: World, threads: ThreadPoolExecutor) -> None:
    engine = StepwiseEngine(stands_after=6)
    replica = world.replica(engine)
    running = threads.submit(replica.pipeline.run, world.assignment())
    assert engine.stands.wait(10)
    begun_s = time.monotonic()
    # What the last snapshot told of is safe: it was taken after the sixth step.
    assert replica.pipeline.drain(0.5).num_tokens_journaled == 240
    assert time.monotonic() - begun_s < 5
    with pytest.raises(EngineClosed):
        running.result(10)
    assert world.num_journaled_tokens() == 240
    engine.go_on.set()


def test_reading_rendering_and_publishing_are_signs_of_life(world: World) -> None:
    replica = world.replica(StepwiseEngine())
    before = replica.pipeline.num_stages_done
    replica.pipeline.run(world.assignment())
    assert replica.pipeline.num_stages_done >= before + 4
    assert replica.pipeline.num_in_hand == 0


def test_a_drained_replica_takes_no_unit_not_even_one_that_needs_no_engine(world: World) -> None:
    replica = world.replica(StepwiseEngine())
    assert replica.pipeline.drain(5.0) == Drained(0, 0)
    for poisoned in ((), tuple(range(NUM_ROWS))):
        with pytest.raises(EngineClosed):
            replica.pipeline.run(world.assignment(poisoned=poisoned))
    assert not (world.output / "completions").exists()
