"""A unit's dead letters through a replica once more, and what each moment it may die at leaves behind."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify, verify_deep
from batchinfer.cluster.engine_loop import EngineLoop
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import Assignment, RetryScope
from batchinfer.cluster.retry_unit import UnitRetry
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Plan
from batchinfer.spec import PromptSpec, SamplingSpec
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.faults import StorageFaults
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import journaled_units
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat
from tests.jobs import model_without_weights
from tests.outputs import FINGERPRINT, begin_job, planned, publish, rows_table, write_shard
from tests.tiny import EOS_TOKEN_ID, VOCAB_SIZE

PART = PartFormat(fingerprint=FINGERPRINT, run_id="retry-1", columns=("id", "text"), n=2)
DEAD = (1, 4, 5, 9)


class SimulatedCrash(BaseException):
    """Ends a replica as SIGKILL would: nothing under test catches it, and nothing is written after it."""


class CrashAt:
    """Dies at the ``number``-th moment around storage calls, and stays dead."""

    def __init__(self, number: int | None = None) -> None:
        self.left = number
        self.has_died = False

    def _moment(self, operation: str, where: str) -> None:
        if self.left == 0:
            self.has_died = True
            raise SimulatedCrash(f"{operation} {where}")
        if self.left is not None:
            self.left -= 1

    before = halfway = after = _moment


@pytest.fixture(scope="module")
def detokenizer(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return Detokenizer(load_tokenizer(model_without_weights(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """One unit of ten rows."""
    return planned(write_shard(tmp_path / "in" / "a.parquet", 10).parent)


@pytest.fixture
def committed(tmp_path: Path, plan: Plan) -> Path:
    """The output of a run that gave up the rows in DEAD."""
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan, n=2)
    publish(output, plan, plan.units[0], dead=DEAD, n=2)
    return tmp_path / "out"


@pytest.fixture
def retry(plan: Plan, detokenizer: Detokenizer) -> Callable[..., int]:
    """Runs a retry of the unit, or a probe of some of its rows; the new completions' or the probed rows' number."""

    def run(
        output_path: Path,
        faults: StorageFaults | None = None,
        *,
        error_types: tuple[str, ...] = (),
        limit: int = 64,
        offsets: range | None = None,
        poisoned: tuple[int, ...] = (),
        speed: float | None = None,
    ) -> int:
        output = locate(str(output_path), policy=RetryPolicy(faults=faults))
        loop = EngineLoop(
            FakeEngine(FakeBehaviour(tokens_per_s=speed), vocab_size=VOCAB_SIZE, reserved=4, capacity=2), 1e-6
        )
        scope = RetryScope(error_types, f"retry-{limit}")
        renderer = PromptRenderer(
            PromptSpec(text="text"),
            SamplingSpec(max_new_tokens=6, n=2),
            detokenizer._tokenizer,
            max_model_len=limit,
            vocab_size=VOCAB_SIZE,
        )
        pipeline = UnitPipeline(
            reader=ParquetReader(partial(locate), rows_table(0).schema),
            renderer=renderer,
            engine_loop=loop,
            texts=Texts(detokenizer, frozenset({EOS_TOKEN_ID})),
            output=output,
            part=PART,
            journals=JournalKeeper(output, scope.journal_fingerprint, "retry-1"),
        )
        units = UnitRetry(pipeline, output, PART, scope)
        assignment = Assignment(plan.units[0], plan.shards[0], 1, 1, poisoned, offsets or range(0))
        try:
            if offsets is not None:
                return len(units.probe(assignment).offsets)
            return units.run(assignment).num_completions
        finally:
            loop.close()

    return run


def parts(output: Path, directory: str = "completions") -> pa.Table:
    return pq.read_table(next((output / directory).iterdir()))


def dead_letters(output: Path) -> list[tuple[object, object, object]]:
    errors = parts(output, "errors").to_pylist()
    return [(row["id"], row["error_type"], row["attempts"]) for row in errors]


def test_dead_letters_alone_are_generated(committed: Path, retry: Callable[..., int]) -> None:
    before = parts(committed).to_pylist()
    assert retry(committed) == 2 * len(DEAD)
    after = parts(committed).to_pylist()
    assert [row["id"] for row in after] == [k for k in range(10) for _ in range(2)]
    assert [row for row in after if row["id"] not in DEAD] == before
    assert list((committed / "errors").iterdir()) == []
    assert verify_deep(str(committed)).verdict == "complete"
    assert retry(committed) == 0


def test_only_those_of_the_types_asked_for(committed: Path, retry: Callable[..., int]) -> None:
    before = dead_letters(committed)
    assert retry(committed, error_types=("template_error", "reason_lost")) == 0
    assert dead_letters(committed) == before
    assert retry(committed, error_types=("template_error", "too_long")) == 2 * len(DEAD)


def test_a_row_that_still_does_not_fit_counts_one_more_attempt(committed: Path, retry: Callable[..., int]) -> None:
    assert retry(committed, limit=2) == 0
    assert dead_letters(committed) == [(row, "too_long", 2) for row in DEAD]
    assert verify(str(committed)).findings == ()


def test_a_row_that_kills_replicas_is_given_up_again_and_the_others_are_generated(
    committed: Path, retry: Callable[..., int]
) -> None:
    """1. replicas die over the unit; 2. halves of it are probed; 3. the culprit, row 4, is known."""
    assert retry(committed, offsets=range(5)) == 5
    assert verify(str(committed)).num_dead_letters == len(DEAD)
    assert retry(committed, poisoned=(4,)) == 2 * (len(DEAD) - 1)
    assert dead_letters(committed) == [(4, "killed_replica", 2)]


def test_every_moment_a_retry_can_die_at_leaves_every_row_in_one_place(
    tmp_path: Path, committed: Path, plan: Plan, retry: Callable[..., int]
) -> None:
    """1. the replica dies at the k-th moment around storage calls; 2. the output is whole; 3. another one goes on."""
    whole = tmp_path / "whole"
    shutil.copytree(committed, whole)
    retry(whole, limit=64)
    wanted, before = parts(whole), parts(committed).to_pylist()
    for number in range(1000):
        faults, output = CrashAt(number), tmp_path / f"out-{number}"
        shutil.copytree(committed, output)
        with suppress(SimulatedCrash):
            retry(output, faults)
        if not faults.has_died:
            break
        report = verify(str(output))
        assert report.verdict in ("complete", "complete_with_dead_letters", "incomplete"), (number, report.findings)
        assert {finding.kind for finding in report.findings} <= {"unfit_errors_part"}, (number, report.findings)
        assert report.num_rows_completed + report.num_dead_letters == report.num_rows
        rows = parts(output).to_pylist()
        assert [row for row in rows if row["id"] not in DEAD] == before, number

        retry(output)
        assert parts(output).equals(wanted), number
        deep = verify_deep(str(output))
        assert (deep.verdict, deep.findings) == ("complete", ()), number
        # A step of a write cut short may leave bytes in _job/tmp, which the next run's start removes.
        assert {remark.kind for remark in deep.remarks} <= {"leftover_bytes"}, number
        shutil.rmtree(output)
    assert 20 < number < 1000


def test_a_retry_goes_on_from_the_journal_of_one_that_died(
    tmp_path: Path, committed: Path, plan: Plan, retry: Callable[..., int]
) -> None:
    class DieBeforeTheCommit(CrashAt):
        def _moment(self, operation: str, where: str) -> None:
            if self.has_died or (operation == "write_replace" and "completions" in where):
                self.has_died = True
                raise SimulatedCrash

        before = halfway = after = _moment

    with pytest.raises(SimulatedCrash):
        retry(committed, DieBeforeTheCommit(), speed=2000.0)
    assert journaled_units(locate(str(committed))) == {plan.units[0].unit_id}
    assert [remark.kind for remark in verify_deep(str(committed)).remarks] == ["leftover_journal"]
    assert retry(committed) == 2 * len(DEAD)
    assert journaled_units(locate(str(committed))) == set()
