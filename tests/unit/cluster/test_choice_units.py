"""Units whose rows choose among texts, and units with rows that are alike: through engine, journal, crash and retry."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify_deep
from batchinfer.cluster.engine_loop import EngineFailed, EngineLoop
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import Assignment, RetryScope
from batchinfer.cluster.retry_unit import UnitRetry
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import RowError, UnitResult
from batchinfer.spec import PromptSpec, SamplingSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import journaled_units
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat
from tests.jobs import model_without_weights
from tests.outputs import FINGERPRINT, begin_job, planned
from tests.tiny import EOS_TOKEN_ID, VOCAB_SIZE

SCHEMA = pa.schema(
    {"id": pa.int64(), "prompt": pa.string(), "own": pa.struct({"choices": pa.list_(pa.string()), "n": pa.int64()})}
)
CHOICES = ["yes", "no", "no idea at all", "A", "AB"]


class CountingEngine(FakeEngine):
    """Remembers what it was given; fails rows, or breaks after some steps, as told."""

    def __init__(
        self,
        *,
        speed: float | None = None,
        breaks_after: int | None = None,
        fails: Callable[[Sequence], bool] = lambda sequence: False,
    ) -> None:
        super().__init__(
            FakeBehaviour(tokens_per_s=speed), vocab_size=VOCAB_SIZE, reserved=4, sleep=lambda seconds: None
        )
        self._breaks_after = breaks_after
        self._fails = fails
        self.submitted: list[Sequence] = []

    def submit(self, sequences: Any) -> None:
        batch = list(sequences)
        self.submitted += batch
        super().submit(batch)

    def step(self) -> list[Generation]:
        if self.stats().num_steps == self._breaks_after:
            raise RuntimeError("CUDA error")
        return [
            Generation(end.sequence, (), "length", error=RowError(end.sequence.prompt.row_id, "out_of_memory", "large"))
            if self._fails(end.sequence)
            else end
            for end in super().step()
        ]


class Desk:
    """One unit over a shard, and replicas that take turns at it."""

    def __init__(self, directory: Path, detokenizer: Detokenizer, **sampling: object) -> None:
        self._detokenizer = detokenizer
        self._sampling = SamplingSpec.model_validate({"max_new_tokens": 30, **sampling})
        self._inputs = directory / "in"
        self.output = directory / "out"
        self._loops: list[EngineLoop] = []

    def write(self, prompts: list[str | None], own: list[dict[str, object] | None] | None = None) -> None:
        table = pa.table(
            {"id": range(len(prompts)), "prompt": prompts, "own": own or [None] * len(prompts)}, schema=SCHEMA
        )
        self._inputs.mkdir(exist_ok=True)
        pq.write_table(table, self._inputs / "shard.parquet")
        self.plan = planned(self._inputs, 1000)
        begin_job(locate(str(self.output)), self.plan, self._sampling.n, sampling_column="own")

    def pipeline(self, engine: FakeEngine, *, limit: int = 128, fingerprint: str = FINGERPRINT) -> UnitPipeline:
        loop = EngineLoop(engine, 0.0)
        self._loops.append(loop)
        output = locate(str(self.output))
        return UnitPipeline(
            reader=ParquetReader(partial(locate), SCHEMA),
            renderer=PromptRenderer(
                PromptSpec(text="prompt", sampling_column="own"),
                self._sampling,
                self._detokenizer._tokenizer,
                max_model_len=limit,
                vocab_size=VOCAB_SIZE,
            ),
            engine_loop=loop,
            texts=Texts(self._detokenizer, frozenset({EOS_TOKEN_ID})),
            output=output,
            part=self.part,
            journals=JournalKeeper(output, fingerprint, "run"),
        )

    @property
    def part(self) -> PartFormat:
        return PartFormat(FINGERPRINT, "run", ("id", "own"), token_ids=True, logprobs=True, choices=True)

    def assignment(self, **fields: Any) -> Assignment:
        return Assignment(self.plan.units[0], self.plan.shards[0], 1, 1, **fields)

    def run(self, engine: FakeEngine | None = None, **options: Any) -> UnitResult:
        return self.pipeline(engine or CountingEngine(), **options).run(self.assignment())

    def retry(self, engine: FakeEngine | None = None, **options: Any) -> UnitResult:
        scope = RetryScope((), "retry")
        pipeline = self.pipeline(engine or CountingEngine(), fingerprint="retry", **options)
        return UnitRetry(pipeline, locate(str(self.output)), self.part, scope).run(self.assignment())

    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.output / "completions").to_pylist()

    def dead_letters(self) -> dict[int, tuple[str, str]]:
        if not (self.output / "errors").is_dir():
            return {}
        rows = pq.read_table(self.output / "errors").to_pylist()
        return {row["id"]: (row["error_type"], row["error"]) for row in rows}

    def close(self) -> None:
        for loop in self._loops:
            loop.close()


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return Detokenizer(load_tokenizer(model_without_weights(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def desk(tmp_path: Path, detokenizer: Detokenizer) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(name: str = "job", **sampling: object) -> Desk:
        directory = tmp_path / name
        directory.mkdir()
        desks.append(Desk(directory, detokenizer, **sampling))
        return desks[-1]

    yield make
    for each in desks:
        each.close()


def assert_scored(row: dict[str, Any], choices: list[str]) -> None:
    scores = row["choices"]
    assert [score["choice"] for score in scores] == choices
    best = max(scores, key=lambda score: score["logprob"])
    assert (row["completion"], row["finish_reason"], row["sample"]) == (best["choice"], "stop", 0)
    assert row["num_completion_tokens"] == best["num_tokens"] == len(row["token_ids"]) == len(row["logprobs"])
    assert sum(token["logprob"] for token in row["logprobs"]) == pytest.approx(best["logprob"], abs=1e-4)
    total = sum(math.exp(score["logprob"]) for score in scores)
    for score in scores:
        assert score["probability"] == pytest.approx(math.exp(score["logprob"]) / total, abs=1e-6)


def test_every_row_gets_its_likeliest_choice_and_the_scores_of_all(desk: Callable[..., Desk]) -> None:
    one = desk(choices=CHOICES, logprobs=0, temperature=0.9)
    one.write([f"question {number}" for number in range(30)])
    engine = CountingEngine()
    result = one.run(engine)
    rows = one.rows()
    assert [row["id"] for row in rows] == list(range(30))
    for row in rows:
        assert_scored(row, CHOICES)
    assert len({row["completion"] for row in rows}) > 1
    assert len(engine.submitted) == 30 * len(CHOICES)
    assert (result.num_completions, result.num_dead_letters, result.num_shared_sequences) == (30, 0, 0)
    assert result.num_completion_tokens == sum(row["num_completion_tokens"] for row in rows)
    assert verify_deep(str(one.output)).findings == ()


def test_rows_bring_their_own_choices_and_bad_ones_are_dead_letters(desk: Callable[..., Desk]) -> None:
    one = desk(logprobs=0)
    one.write(
        ["one", "two", "three", "four", "five", "x" * 120, "seven", "eight"],
        [
            {"choices": ["red", "green"]},
            None,
            {"choices": ["left"]},
            {"choices": ["up", "up"]},
            {"choices": ["up", "down"], "n": 2},
            {"choices": ["a long way to go"]},
            {"choices": [""]},
            {"choices": []},
        ],
    )
    one.run()
    rows = {row["id"]: row for row in one.rows()}
    assert sorted(rows) == [0, 1, 2, 7]
    assert_scored(rows[0], ["red", "green"])
    assert_scored(rows[2], ["left"])
    assert rows[2]["choices"][0]["probability"] == 1.0
    # Rows without any are generated as in any job.
    for plain in (1, 7):
        assert rows[plain]["choices"] is None
        assert rows[plain]["num_completion_tokens"] > 0
    dead = one.dead_letters()
    assert {key: kind for key, (kind, _) in dead.items()} == {
        3: "bad_sampling",
        4: "bad_sampling",
        5: "too_long",
        6: "bad_sampling",
    }
    assert "'up' are there twice" in dead[3][1]
    assert "n: 2" in dead[4][1]
    assert "limit of 128" in dead[5][1]
    assert verify_deep(str(one.output)).findings == ()


@pytest.mark.parametrize("breaks_after", [1, 3, 9])
def test_a_crash_among_a_rows_choices_is_resumed_to_the_same_scores(
    desk: Callable[..., Desk], breaks_after: int
) -> None:
    """1. The engine breaks when some choices of a row are scored and others are not. 2. The next replica goes on."""
    prompts: list[str | None] = [f"question {number}" for number in range(12)]
    whole = desk("whole", choices=CHOICES, logprobs=0)
    whole.write(prompts)
    whole.run()
    one = desk("broken", choices=CHOICES, logprobs=0)
    one.write(prompts)
    broken = CountingEngine(speed=120.0, breaks_after=breaks_after)
    with pytest.raises(EngineFailed):
        one.run(broken)
    assert not list((one.output / "completions").glob("*")) if (one.output / "completions").is_dir() else True
    assert journaled_units(locate(str(one.output)))
    second = CountingEngine()
    result = one.run(second)
    assert one.rows() == whole.rows()
    assert result.num_resumed_tokens > 0
    # What the journal knew was not scored again, neither ended choices nor the first tokens of others.
    num_tokens = sum(len(sequence.forced) for sequence in broken.submitted)
    assert broken.stats().num_completion_tokens + second.stats().num_completion_tokens <= num_tokens + 4
    assert len(second.submitted) < len(broken.submitted)
    assert not journaled_units(locate(str(one.output)))


def test_dead_letters_of_choices_are_retried(desk: Callable[..., Desk]) -> None:
    one = desk(choices=CHOICES, logprobs=0)
    one.write(["one", "two " * 9, "three", "x" * 60, "five"])
    one.run(limit=40)
    assert {key: kind for key, (kind, _) in one.dead_letters().items()} == {3: "too_long"}
    assert one.retry(limit=128).num_completions == 1
    rows = one.rows()
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert_scored(row, CHOICES)
    assert one.dead_letters() == {}
    assert verify_deep(str(one.output)).findings == ()


def test_one_choice_that_fails_makes_its_row_a_dead_letter_and_a_retry_scores_it(desk: Callable[..., Desk]) -> None:
    one = desk(choices=CHOICES, logprobs=0)
    one.write(["one", "two", "three"])
    one.run(CountingEngine(fails=lambda it: it.prompt.row_id.endswith(":1") and it.sample == 3))
    assert [row["id"] for row in one.rows()] == [0, 2]
    assert one.dead_letters() == {1: ("out_of_memory", "large")}
    one.retry()
    assert [row["id"] for row in one.rows()] == [0, 1, 2]


def test_a_damaged_score_is_found_by_the_deep_audit(desk: Callable[..., Desk]) -> None:
    one = desk(choices=CHOICES, logprobs=0)
    one.write(["one", "two", "three", "four"])
    whole = one.part

    def publish(change: Callable[[dict[str, Any]], None]) -> list[str]:
        from batchinfer.storage import checksums

        path = next((one.output / "completions").iterdir())
        place = locate(str(path))
        label = checksums.read_label(place, place.size_bytes())
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows[2])
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
        assert label is not None
        path.write_bytes(checksums.add_to_parquet(sink.getvalue().to_pybytes(), label))
        return [f"{it.kind} {it.detail}" for it in verify_deep(str(one.output)).findings]

    def other_completion(row: dict[str, Any]) -> None:
        row["completion"] = next(choice for choice in CHOICES if choice != row["completion"])

    def wrong_share(row: dict[str, Any]) -> None:
        row["choices"][0]["probability"] += 0.01

    assert whole.choices
    for change in (other_completion, wrong_share):
        for path in (one.output / "completions").glob("*"):
            path.unlink()
        one.run()
        assert publish(lambda row: None) == []
        (found,) = publish(change)
        assert "in column choices" in found


# Rows that are alike


def duplicated(num_rows: int, num_distinct: int, seed: int = 0) -> list[str | None]:
    dice = random.Random(seed)
    return [f"question {dice.randrange(num_distinct)}" for _ in range(num_rows)]


def without_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "row_id"} for row in rows]


def unshared(desk: Callable[..., Desk], prompts: list[str | None], **sampling: object) -> list[dict[str, Any]]:
    """What each of these rows comes to when it is alone in its unit and on its replica."""
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        alone = desk(f"alone-{number}", **sampling)
        alone.write([prompt])
        alone.run()
        rows += [{**row, "id": number} for row in alone.rows()]
        alone.close()
    return without_ids(rows)


@pytest.mark.parametrize("sampling", [{}, {"n": 3}, {"choices": CHOICES}, {"logprobs": 2}], ids=str)
def test_rows_that_are_alike_are_generated_once_and_come_out_as_if_each_had_been(
    desk: Callable[..., Desk], sampling: dict[str, object]
) -> None:
    sampling = {"logprobs": 0, **sampling}
    prompts = duplicated(16, 5)
    one = desk(**sampling)
    one.write(prompts)
    engine = CountingEngine()
    result = one.run(engine)
    assert without_ids(one.rows()) == unshared(desk, prompts, **sampling)
    per_row = len(CHOICES) if "choices" in sampling else int(str(sampling.get("n", 1)))
    per_distinct = len(CHOICES) if "choices" in sampling else 1
    num_distinct = len(set(prompts))
    assert len(engine.submitted) == num_distinct * per_distinct
    assert result.num_shared_sequences == 16 * per_row - num_distinct * per_distinct
    assert result.num_completions == len(one.rows())
    assert verify_deep(str(one.output)).findings == ()


def test_drawn_rows_are_not_shared(desk: Callable[..., Desk]) -> None:
    one = desk(temperature=0.8, logprobs=0)
    one.write(["same"] * 6)
    engine = CountingEngine()
    assert one.run(engine).num_shared_sequences == 0
    assert len(engine.submitted) == 6
    assert len({tuple(row["token_ids"]) for row in one.rows()}) == 6


@pytest.mark.parametrize("breaks_after", [0, 1, 4, 7])
def test_a_crash_among_rows_that_are_alike_loses_nothing(desk: Callable[..., Desk], breaks_after: int) -> None:
    """1. The engine breaks. 2. The journal knows leaders alone. 3. The next replica fans out what it finds there."""
    prompts = duplicated(40, 8)
    whole = desk("whole", logprobs=0, ignore_eos=True)
    whole.write(prompts)
    whole.run()
    one = desk("broken", logprobs=0, ignore_eos=True)
    one.write(prompts)
    broken = CountingEngine(speed=600.0, breaks_after=breaks_after)
    with pytest.raises(EngineFailed):
        one.run(broken)
    second = CountingEngine()
    result = one.run(second)
    assert one.rows() == whole.rows()
    assert broken.stats().num_completion_tokens + second.stats().num_completion_tokens <= 8 * 30 + 30 * (
        not breaks_after
    )
    assert len(second.submitted) <= 8
    assert result.num_completions == 40


def test_a_row_that_fails_takes_its_twins_with_it_each_under_its_own_name(desk: Callable[..., Desk]) -> None:
    one = desk(logprobs=0)
    one.write(["a", "b", "a", "a", "c"])
    first = one.plan.units[0].row_id(0)
    result = one.run(CountingEngine(fails=lambda it: it.prompt.row_id == first))
    assert [row["id"] for row in one.rows()] == [1, 4]
    assert one.dead_letters() == dict.fromkeys((0, 2, 3), ("out_of_memory", "large"))
    assert result.dead_letters_by_type == {"out_of_memory": 3}
    # Another try may do better: the failure is not remembered.
    engine = CountingEngine()
    assert one.retry(engine).num_completions == 3
    assert len(engine.submitted) == 1
    assert [row["id"] for row in one.rows()] == [0, 1, 2, 3, 4]
    assert verify_deep(str(one.output)).findings == ()


def test_a_poisoned_row_is_left_out_and_its_twin_leads(desk: Callable[..., Desk]) -> None:
    """The work queue knows rows by their places: a twin of a culprit is one of its own, and found as one."""
    one = desk(logprobs=0)
    one.write(["a", "b", "a"])
    engine = CountingEngine()
    one.pipeline(engine).run(one.assignment(poisoned=(0,)))
    assert [it.prompt.row_id for it in engine.submitted] == [one.plan.units[0].row_id(k) for k in (1, 2)]
    assert [row["id"] for row in one.rows()] == [1, 2]
    assert one.dead_letters()[0][0] == "killed_replica"


def test_a_probe_of_a_twin_is_found_by_the_whole_unit(desk: Callable[..., Desk]) -> None:
    """1. A probe generates the second of two like rows. 2. It is in the journal. 3. The first gets it from there."""
    one = desk(logprobs=0)
    one.write(["b", "a", "a"])
    one.pipeline(CountingEngine()).probe(one.assignment(offsets=range(2, 3)))
    engine = CountingEngine()
    result = one.run(engine)
    assert [it.prompt.row_id for it in engine.submitted] == [one.plan.units[0].row_id(0)]
    assert [row["id"] for row in one.rows()] == [0, 1, 2]
    assert result.num_shared_sequences == 1
    assert result.num_resumed_tokens == one.rows()[2]["num_completion_tokens"]


def test_later_units_of_a_replica_are_answered_from_memory(desk: Callable[..., Desk]) -> None:
    one = desk(logprobs=0)
    one.write(duplicated(60, 10))
    one.plan = planned(one._inputs, 20)
    begin_job(locate(str(one.output)), one.plan)
    engine = CountingEngine()
    pipeline = one.pipeline(engine)
    results = [pipeline.run(Assignment(unit, one.plan.shards[0], 1)) for unit in one.plan.units]
    assert len(engine.submitted) == len(set(duplicated(60, 10)))
    assert sum(result.num_shared_sequences for result in results) == 60 - len(engine.submitted)
    texts: dict[str, set[str]] = {}
    for prompt, row in zip(duplicated(60, 10), one.rows(), strict=True):
        texts.setdefault(str(prompt), set()).add(row["completion"])
    assert Counter(map(len, texts.values())) == {1: 10}
    assert verify_deep(str(one.output)).findings == ()
