"""One work unit from shard to part: every row ends as completions or as a dead letter, whatever happens to it."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.engine_loop import EngineFailed, EngineLoop
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import Assignment
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import SHARD_CORRUPT, UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Engine, EngineStats, Generation, Partial, Sequence
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.planner import plan_input
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import FinishReason, Prompt, RowError, SamplingParams, UnitResult
from batchinfer.spec import PromptSpec, SamplingSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat
from tests.jobs import model_without_weights
from tests.tiny import EOS_TOKEN_ID, VOCAB_SIZE

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("prompt", pa.string())])
Answer = Callable[[Sequence], Generation]


class ScriptedEngine:
    """Answers every sequence in the next step, as the test says."""

    capacity = 8

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._waiting: list[Sequence] = []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    def step(self) -> list[Generation]:
        waiting, self._waiting = self._waiting, []
        # Any order is the engine's right.
        return [self._answer(sequence) for sequence in reversed(waiting)]

    def abort(self, sequence_ids: Iterable[tuple[str, int]]) -> None:
        raise NotImplementedError

    def in_progress(self) -> list[Partial]:
        return []

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None:
        self._waiting = []


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return Detokenizer(load_tokenizer(model_without_weights(tmp_path_factory.mktemp("model"))))


class Desk:
    """A shard, a pipeline over it, and what it left in the output."""

    def __init__(self, directory: Path, detokenizer: Detokenizer, engine: Engine | None = None, **sampling: object):
        self.output = directory / "out"
        self.shard_path = directory / "in" / "shard.parquet"
        self.loop = EngineLoop(engine or FakeEngine(vocab_size=VOCAB_SIZE, reserved=4))
        spec = SamplingSpec.model_validate({"max_new_tokens": 6, **sampling})
        self.pipeline = UnitPipeline(
            reader=ParquetReader(partial(locate), SCHEMA),
            renderer=PromptRenderer(
                PromptSpec(text="prompt"), spec, detokenizer._tokenizer, max_model_len=64, vocab_size=VOCAB_SIZE
            ),
            engine_loop=self.loop,
            texts=Texts(detokenizer, frozenset({EOS_TOKEN_ID})),
            output=locate(str(self.output)),
            part=PartFormat(fingerprint="f" * 16, run_id="run", columns=("id",), n=spec.n, token_ids=True),
            journals=JournalKeeper(locate(str(self.output)), "f" * 16, "run"),
            idle_clock=self.loop.idle_clock,
        )

    def write(self, prompts: Iterable[str | None]) -> None:
        values = list(prompts)
        table = pa.table({"id": range(len(values)), "prompt": values}, schema=SCHEMA)
        self.shard_path.parent.mkdir(exist_ok=True)
        pq.write_table(
            table,
            self.shard_path,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            data_page_size=256,
            write_batch_size=8,
            write_page_checksum=True,
        )

    def assignment(self, attempt: int = 1) -> Assignment:
        plan = plan_input([str(self.shard_path.parent)], None, 1000).plan
        return Assignment(plan.units[0], plan.shards[0], attempt)

    def run(self, attempt: int = 1) -> UnitResult:
        return self.pipeline.run(self.assignment(attempt))

    def completions(self) -> list[dict[str, object]]:
        return pq.read_table(self.output / "completions").to_pylist()

    def dead_letters(self) -> dict[object, dict[str, object]]:
        return {row["id"]: row for row in pq.read_table(self.output / "errors").to_pylist()}


def test_every_row_of_a_unit_is_generated_and_counted(tmp_path: Path, detokenizer: Detokenizer) -> None:
    desk = Desk(tmp_path, detokenizer)
    desk.write(f"prompt {number}" for number in range(20))
    result = desk.run()
    rows = desk.completions()
    assert [row["id"] for row in rows] == list(range(20))
    assert (result.num_rows, result.num_completions, result.num_dead_letters) == (20, 20, 0)
    assert result.num_prompt_tokens == sum(int(str(row["num_prompt_tokens"])) for row in rows)
    assert result.num_completion_tokens == sum(int(str(row["num_completion_tokens"])) for row in rows)
    assert not result.already_committed
    assert not (desk.output / "errors").exists()


def test_the_engine_idles_for_the_slowest_of_a_units_stages(
    tmp_path: Path, detokenizer: Detokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, detokenizer)
    desk.write(f"prompt {number}" for number in range(4))

    def slowly(method: str) -> None:
        swift = getattr(desk.pipeline, method)

        def slow(*arguments: object) -> object:
            time.sleep(0.2)
            return swift(*arguments)

        monkeypatch.setattr(desk.pipeline, method, slow)

    slowly("prepare")
    before = desk.loop.idle_clock.seconds()
    desk.run()
    between = desk.loop.idle_clock.seconds()
    assert between["rows"] - before["rows"] >= 0.2
    assert between["publishing"] < 0.2
    monkeypatch.undo()
    slowly("publish")
    desk.output.joinpath("completions").rename(tmp_path / "aside")
    desk.run()
    after = desk.loop.idle_clock.seconds()
    assert after["publishing"] - between["publishing"] >= 0.2
    assert after["next_turns"] < 0.2


def test_rows_that_are_no_prompts_become_dead_letters_and_the_others_are_generated(
    tmp_path: Path, detokenizer: Detokenizer
) -> None:
    desk = Desk(tmp_path, detokenizer)
    desk.write(["first", None, "", "   ", "x" * 200, "last"])
    result = desk.run()
    assert [row["id"] for row in desk.completions()] == [0, 5]
    assert {key: row["error_type"] for key, row in desk.dead_letters().items()} == {
        1: "null_prompt",
        2: "empty_prompt",
        3: "empty_prompt",
        4: "too_long",
    }
    assert "limit of 64" in str(desk.dead_letters()[4]["error"])
    assert result.dead_letters_by_type == {"null_prompt": 1, "empty_prompt": 2, "too_long": 1}
    assert (result.num_completions, result.num_dead_letters) == (2, 4)


def test_a_unit_of_dead_letters_alone_is_committed_without_the_engine(tmp_path: Path, detokenizer: Detokenizer) -> None:
    def refuse(sequence: Sequence) -> Generation:
        raise AssertionError(sequence)

    desk = Desk(tmp_path, detokenizer, ScriptedEngine(refuse))
    desk.write([None, None])
    result = desk.run()
    assert (result.num_completions, result.num_dead_letters) == (0, 2)
    assert desk.completions() == []
    assert len(list((desk.output / "completions").iterdir())) == 1


def test_n_samples_per_row_are_in_order_and_the_prompt_is_counted_once(
    tmp_path: Path, detokenizer: Detokenizer
) -> None:
    desk = Desk(tmp_path, detokenizer, n=3, temperature=1.0)
    desk.write(["one", "two"])
    result = desk.run()
    rows = desk.completions()
    assert [(row["id"], row["sample"]) for row in rows] == [(key, sample) for key in (0, 1) for sample in (0, 1, 2)]
    assert result.num_completions == 6
    assert result.num_prompt_tokens == sum(int(str(row["num_prompt_tokens"])) for row in rows if row["sample"] == 0)


def answering(token_ids: tuple[int, ...], reason: FinishReason = "stop") -> Answer:
    return lambda sequence: Generation(sequence, token_ids, reason)


def test_one_failed_sample_makes_its_whole_row_a_dead_letter(tmp_path: Path, detokenizer: Detokenizer) -> None:
    def answer(sequence: Sequence) -> Generation:
        row_id = sequence.prompt.row_id
        if row_id.endswith(":1") and sequence.sample == 1:
            return Generation(sequence, (), "stop", error=RowError(row_id, "too_large", "does not fit the device"))
        return Generation(sequence, (10, 11), "length")

    desk = Desk(tmp_path, detokenizer, ScriptedEngine(answer), n=2, temperature=1.0)
    desk.write(["zero", "one", "two"])
    result = desk.run()
    assert [(row["id"], row["sample"]) for row in desk.completions()] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert desk.dead_letters()[1]["error_type"] == "too_large"
    assert (result.num_completions, result.num_dead_letters) == (4, 1)


def spelled(detokenizer: Detokenizer, text: str) -> tuple[int, ...]:
    return tuple(detokenizer._tokenizer(text)["input_ids"])


def test_the_text_ends_before_the_stop_string_and_the_ids_keep_it(tmp_path: Path, detokenizer: Detokenizer) -> None:
    ids = spelled(detokenizer, "yes. no")
    desk = Desk(tmp_path, detokenizer, ScriptedEngine(answering(ids)), stop=[". "], max_new_tokens=50)
    desk.write(["question"])
    desk.run()
    (row,) = desk.completions()
    assert row["completion"] == "yes"
    assert row["token_ids"] == list(ids)
    assert row["num_completion_tokens"] == len(ids)


def test_a_completion_cut_by_its_length_keeps_what_looks_like_a_stop_string(
    tmp_path: Path, detokenizer: Detokenizer
) -> None:
    """The engine would have stopped there, so the string lies inside the tokens that min_new_tokens ignores."""
    engine = ScriptedEngine(answering(spelled(detokenizer, "yes. no"), "length"))
    desk = Desk(tmp_path, detokenizer, engine, stop=[". "], max_new_tokens=50)
    desk.write(["question"])
    desk.run()
    assert desk.completions()[0]["completion"] == "yes. no"


def text_of(detokenizer: Detokenizer | None, ids: tuple[int, ...], reason: FinishReason, **sampling: object) -> str:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    generation = Generation(Sequence(Prompt("row:0", (1,), params)), ids, reason)
    return Texts(detokenizer, frozenset({7, EOS_TOKEN_ID})).of([generation])[0]


def test_the_stop_id_is_no_text(detokenizer: Detokenizer) -> None:
    ids = spelled(detokenizer, "Hi")
    letter = spelled(detokenizer, "Q")
    # Id 7 is a letter of the vocabulary: skipping special tokens alone would leave it in.
    assert text_of(detokenizer, (*ids, 7), "stop") == "Hi"
    assert text_of(detokenizer, (*ids, *letter), "stop", stop_token_ids=letter) == "Hi"
    assert text_of(detokenizer, (*ids, *letter), "stop") == "HiQ"


def test_an_end_of_sequence_id_that_ended_nothing_stays(detokenizer: Detokenizer) -> None:
    ids = spelled(detokenizer, "Hi")
    seventh = detokenizer.decode([7])
    assert seventh
    assert text_of(detokenizer, (*ids, 7), "length", ignore_eos=True) == "Hi" + seventh
    assert text_of(detokenizer, (7, *ids), "stop") == seventh + "Hi"


def test_stop_strings_within_the_first_min_new_tokens_do_not_cut(detokenizer: Detokenizer) -> None:
    ids = spelled(detokenizer, "a.b.c.")
    assert text_of(detokenizer, ids, "stop", stop=(".",), min_new_tokens=2) == "a.b"
    assert text_of(detokenizer, ids, "stop", stop=(".",)) == "a"


def test_without_a_tokenizer_texts_are_empty() -> None:
    assert text_of(None, (5, 6), "stop", stop=("x",)) == ""


def test_rows_behind_the_damage_of_a_shard_become_dead_letters_that_name_it(
    tmp_path: Path, detokenizer: Detokenizer
) -> None:
    desk = Desk(tmp_path, detokenizer)
    desk.write(f"prompt {number}" for number in range(100))
    assignment = desk.assignment()
    content = bytearray(desk.shard_path.read_bytes())
    content[content.index(b"prompt 60")] ^= 0xFF
    desk.shard_path.write_bytes(content)

    result = desk.pipeline.run(Assignment(assignment.unit, assignment.shard, attempt=2))
    generated = [row["id"] for row in desk.completions()]
    lost = pq.read_table(desk.output / "errors").to_pylist()
    assert 0 < len(generated) <= 60
    assert generated == list(range(len(generated)))
    assert [row["row_id"] for row in lost] == [assignment.unit.row_id(offset) for offset in range(len(generated), 100)]
    assert {row["error_type"] for row in lost} == {SHARD_CORRUPT}
    assert all("shard.parquet" in row["error"] and row["attempts"] == 2 for row in lost)
    assert result.num_dead_letters == len(lost)
    assert result.num_completions + result.num_dead_letters == 100


def test_a_repeated_run_finds_the_unit_committed_and_counts_the_same(tmp_path: Path, detokenizer: Detokenizer) -> None:
    desk = Desk(tmp_path, detokenizer)
    desk.write(["one", None, "three"])
    first = desk.run()
    files = {path: path.read_bytes() for path in desk.output.rglob("*.parquet")}
    second = desk.run(attempt=2)
    assert (first.already_committed, second.already_committed) == (False, True)
    assert (second.num_rows, second.num_completions, second.num_dead_letters) == (3, 2, 1)
    assert (second.num_prompt_tokens, second.num_completion_tokens) == (
        first.num_prompt_tokens,
        first.num_completion_tokens,
    )
    assert {path: path.read_bytes() for path in desk.output.rglob("*.parquet")} == files


def test_an_engine_that_breaks_leaves_nothing_of_the_unit(tmp_path: Path, detokenizer: Detokenizer) -> None:
    desk = Desk(tmp_path, detokenizer, FakeEngine(FakeBehaviour(error_rate=1.0)))
    desk.write(["one", None])
    with pytest.raises(EngineFailed):
        desk.run()
    assert not desk.output.exists()
