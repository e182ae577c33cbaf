"""``prompt.turns`` from shard to part: every turn is answered in its place, whatever interrupts the unit."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.engine_loop import EngineClosed, EngineFailed, EngineLoop
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import Assignment, RetryScope
from batchinfer.cluster.retry_unit import UnitRetry
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.fake import FakeBehaviour
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.planner import plan_input
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import TokenLogprobs
from batchinfer.spec import PromptSpec, SamplingSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import JournaledSequence, JournalWriter, read_journal
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat
from tests.jobs import model_without_weights
from tests.tiny import EOS_TOKEN_ID, VOCAB_SIZE
from tests.unit.cluster import test_resume

SCHEMA = pa.schema({"id": pa.int64(), "turns": pa.list_(pa.string())})
PRINT = "f" * 16
NUM_TOKENS = 20
TURNS = [["one"], ["two", "three"], ["four", "five", "six"], ["seven", "eight"]]
NUM_TURNS = sum(map(len, TURNS))


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return Detokenizer(load_tokenizer(model_without_weights(tmp_path_factory.mktemp("model"))))


class StepwiseEngine(test_resume.StepwiseEngine):
    """Ten tokens per step: whatever is in flight at once, the unit takes sixteen steps at least."""

    def __init__(self, *, breaks_after: int | None = None, stands_after: int | None = None) -> None:
        super().__init__(breaks_after=breaks_after, stands_after=stands_after)
        self._behaviour = FakeBehaviour(tokens_per_s=200.0)


class Desk:
    """One unit of conversations; every pipeline over it has an engine of its own."""

    def __init__(
        self, directory: Path, detokenizer: Detokenizer, turns: Sequence[object] = TURNS, **sampling: object
    ) -> None:
        self._detokenizer = detokenizer
        self.output = directory / "out"
        self.sampling = SamplingSpec.model_validate({"max_new_tokens": NUM_TOKENS, "ignore_eos": True, **sampling})
        self._loops: list[EngineLoop] = []
        self.part = PartFormat(PRINT, "run", ("id",), self.sampling.n, token_ids=True, logprobs=True, answers=True)
        inputs = directory / "in"
        inputs.mkdir(parents=True)
        table = pa.table({"id": range(len(turns)), "turns": turns}, schema=SCHEMA)
        pq.write_table(table, inputs / "shard.parquet")
        plan = plan_input([str(inputs)], None, 1000).plan
        self.unit, self._shard = plan.units[0], plan.shards[0]

    def renderer(self, max_model_len: int = 512) -> PromptRenderer:
        spec, tokenizer = PromptSpec(turns="turns"), self._detokenizer._tokenizer
        return PromptRenderer(spec, self.sampling, tokenizer, max_model_len=max_model_len, vocab_size=VOCAB_SIZE)

    def assignment(self, **fields: object) -> Assignment:
        return Assignment(self.unit, self._shard, 1, **fields)  # type: ignore[arg-type]

    def pipeline(
        self, engine: StepwiseEngine, *, lease: int = 1, max_model_len: int = 512, journal: str = PRINT
    ) -> UnitPipeline:
        self._loops.append(EngineLoop(engine, snapshot_interval_s=0.0))
        output = locate(str(self.output))
        return UnitPipeline(
            reader=ParquetReader(partial(locate), SCHEMA),
            renderer=self.renderer(max_model_len),
            engine_loop=self._loops[-1],
            texts=Texts(self._detokenizer, frozenset({EOS_TOKEN_ID})),
            output=output,
            part=self.part,
            journals=JournalKeeper(output, journal, f"run{lease}"),
        )

    def close(self) -> None:
        for loop in self._loops:
            loop.close()

    def rows(self) -> list[dict[str, object]]:
        return pq.read_table(self.output / "completions").to_pylist()

    def dead_letters(self) -> dict[object, tuple[object, object]]:
        return {
            row["id"]: (row["error_type"], row["error"]) for row in pq.read_table(self.output / "errors").to_pylist()
        }

    def journal(self) -> dict[tuple[str, int, int], JournaledSequence]:
        return dict(read_journal(locate(str(self.output)), self.unit.unit_id, PRINT).sequences)

    def num_journaled_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.journal().values())


@pytest.fixture
def desk(tmp_path: Path, detokenizer: Detokenizer) -> Iterator[Desk]:
    made = Desk(tmp_path, detokenizer, logprobs=0)
    yield made
    made.close()


@pytest.fixture
def expected(tmp_path: Path, detokenizer: Detokenizer) -> list[dict[str, object]]:
    quiet = Desk(tmp_path / "quiet", detokenizer, logprobs=0)
    quiet.pipeline(StepwiseEngine()).run(quiet.assignment())
    quiet.close()
    return quiet.rows()


def test_every_turn_is_answered_with_all_before_it_in_view(desk: Desk, detokenizer: Detokenizer) -> None:
    result = desk.pipeline(StepwiseEngine()).run(desk.assignment())
    rows = desk.rows()
    assert [len(row["answers"]) for row in rows] == list(map(len, TURNS))  # type: ignore[arg-type]
    for row, turns in zip(rows, TURNS, strict=True):
        answers = row["answers"]
        assert isinstance(answers, list)
        text = "[|system|][|endofturn|]\n"
        for turn, answer in zip(turns, answers, strict=True):
            text += f"[|user|]{turn}\n[|assistant|]"
            prompt = detokenizer._tokenizer(text, add_special_tokens=False)["input_ids"]
            assert answer["num_prompt_tokens"] == len(prompt)
            assert (answer["num_completion_tokens"], answer["finish_reason"]) == (NUM_TOKENS, "length")
            text += f"{answer['completion']}[|endofturn|]\n"
        assert row["completion"] == answers[-1]["completion"]
        assert row["num_prompt_tokens"] == answers[-1]["num_prompt_tokens"]
        assert row["num_completion_tokens"] == NUM_TOKENS * len(turns)
        token_ids, logprobs = row["token_ids"], row["logprobs"]
        assert isinstance(token_ids, list)
        assert isinstance(logprobs, list)
        assert len(token_ids) == len(logprobs) == NUM_TOKENS * len(turns)
        assert [scored["token_id"] for scored in logprobs] == token_ids
        assert detokenizer.decode(token_ids[:NUM_TOKENS]) == answers[0]["completion"]
    assert (result.num_completions, result.num_completion_tokens) == (len(TURNS), NUM_TOKENS * NUM_TURNS)


def test_each_sample_is_a_conversation_of_its_own(tmp_path: Path, detokenizer: Detokenizer) -> None:
    desk = Desk(tmp_path, detokenizer, n=3, temperature=1.0)
    result = desk.pipeline(StepwiseEngine()).run(desk.assignment())
    rows = desk.rows()
    assert [(row["id"], row["sample"]) for row in rows] == [(k, sample) for k in range(4) for sample in range(3)]
    for turn in (0, 1):
        answers = {row["answers"][turn]["completion"] for row in rows if len(row["answers"]) > turn}  # type: ignore[index, arg-type]
        assert len(answers) == sum(len(turns) > turn for turns in TURNS) * 3
    assert result.num_completions == 12
    desk.close()


def test_a_turn_that_cannot_be_generated_makes_its_whole_row_a_dead_letter_and_is_named(
    tmp_path: Path, detokenizer: Detokenizer
) -> None:
    turns = [["fine", "fine"], [], None, ["one", None], [" "], ["short", "x" * 900], ["x" * 900, "short"]]
    desk = Desk(tmp_path, detokenizer, turns)
    result = desk.pipeline(StepwiseEngine()).run(desk.assignment())
    assert [row["id"] for row in desk.rows()] == [0]
    assert desk.dead_letters() == {
        1: ("empty_prompt", "there are no turns"),
        2: ("null_prompt", "the turns are null"),
        3: ("null_prompt", "turn 2 of 2: the prompt is null"),
        4: ("empty_prompt", "turn 1 of 1: the prompt is empty"),
        5: ("too_long", desk.dead_letters()[5][1]),
        6: ("too_long", desk.dead_letters()[6][1]),
    }
    assert str(desk.dead_letters()[5][1]).startswith("turn 2 of 2: ")
    assert str(desk.dead_letters()[6][1]).startswith("turn 1 of 2: ")
    assert (result.num_completions, result.num_dead_letters) == (1, 6)
    desk.close()


@pytest.mark.parametrize("breaks_after", [1, 4, 7, 10, 13])
def test_a_crash_in_any_turn_redoes_no_token_of_it_or_of_those_before(
    desk: Desk, expected: list[dict[str, object]], breaks_after: int
) -> None:
    """1. the engine breaks, what was generated is journaled  2. another replica goes on with the rest"""
    first, second = StepwiseEngine(breaks_after=breaks_after), StepwiseEngine()
    with pytest.raises(EngineFailed):
        desk.pipeline(first).run(desk.assignment())
    journaled = desk.num_journaled_tokens()
    assert journaled == first.num_tokens
    result = desk.pipeline(second, lease=2).run(desk.assignment(lease=2))
    assert desk.rows() == expected
    assert second.num_tokens == NUM_TOKENS * NUM_TURNS - journaled
    assert result.num_resumed_tokens == journaled
    assert desk.journal() == {}


def test_a_drained_unit_goes_on_in_the_turn_it_was_in(desk: Desk, expected: list[dict[str, object]]) -> None:
    """1. a drain finds conversations in their second turns  2. the next replica goes on"""
    first, second = StepwiseEngine(stands_after=10), StepwiseEngine()
    pipeline = desk.pipeline(first)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pipeline.run, desk.assignment())
        assert first.stands.wait(20)
        first.go_on.set()
        drained = pipeline.drain(20)
        with pytest.raises(EngineClosed):
            running.result(20)
    assert drained.num_tokens_journaled == desk.num_journaled_tokens() == first.num_tokens
    assert any(turn > 0 for _, _, turn in desk.journal())
    desk.pipeline(second, lease=2).run(desk.assignment(lease=2))
    assert desk.rows() == expected
    assert second.num_tokens == NUM_TOKENS * NUM_TURNS - drained.num_tokens_journaled


def test_a_probe_journals_all_turns_of_its_rows(desk: Desk, expected: list[dict[str, object]]) -> None:
    first, second = StepwiseEngine(), StepwiseEngine()
    desk.pipeline(first).probe(desk.assignment(offsets=range(1, 3)))
    assert sorted(turn for _, _, turn in desk.journal()) == [0, 0, 1, 1, 2]
    desk.pipeline(second, lease=2).run(desk.assignment(lease=2))
    assert desk.rows() == expected
    assert first.num_tokens == 5 * NUM_TOKENS
    assert second.num_tokens == (NUM_TURNS - 5) * NUM_TOKENS


def test_a_turn_behind_another_answer_is_not_gone_on_with(desk: Desk, expected: list[dict[str, object]]) -> None:
    """What a zombie wrote, whose first turn came out differently: the fake engine refuses tokens of another prompt."""
    scored = expected[1]["logprobs"]
    assert isinstance(scored, list)
    logprobs = tuple(TokenLogprobs(it["token_id"], it["logprob"]) for it in scored[:NUM_TOKENS])
    first_turn = tuple(it.token_id for it in logprobs)
    foreign = (TokenLogprobs(11, -0.5), TokenLogprobs(12, -0.5))
    row_id = desk.unit.row_id(1)
    JournalWriter(locate(str(desk.output)), desk.unit.unit_id, PRINT, "run0", 0).flush(
        [
            JournaledSequence(row_id, 0, first_turn, logprobs, "length"),
            JournaledSequence(row_id, 0, (11, 12), foreign, turn=1, prompt_checksum=4711),
        ]
    )
    result = desk.pipeline(StepwiseEngine()).run(desk.assignment())
    assert desk.rows() == expected
    assert result.num_resumed_tokens == NUM_TOKENS


def test_a_dead_conversation_is_completed_by_a_retry_with_more_room(
    desk: Desk, expected: list[dict[str, object]]
) -> None:
    longest = max(int(str(row["num_prompt_tokens"])) for row in expected)
    desk.pipeline(StepwiseEngine(), max_model_len=longest).run(desk.assignment())
    ((row, (kind, error)),) = desk.dead_letters().items()
    assert (row, kind, str(error)[:13]) == (2, "too_long", "turn 3 of 3: ")
    scope = RetryScope((), "e" * 16)
    pipeline = desk.pipeline(StepwiseEngine(), lease=2, journal="e" * 16)
    retried = UnitRetry(pipeline, locate(str(desk.output)), desk.part, scope).run(desk.assignment(lease=2))
    assert (retried.num_completions, retried.num_dead_letters) == (1, 0)
    assert desk.rows() == expected
