"""What a retry is about: which jobs it may be of, which units it touches, and what it notes down."""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.prepare import Preparation, prepare
from batchinfer.cluster.retry_prepare import note_retry, prepare_retry
from batchinfer.cluster.run_record import RunRecord
from batchinfer.errors import FingerprintMismatch, OutputError
from batchinfer.records import Completion, RowError, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import journaled_units
from batchinfer.storage.layout import completions_part, errors_part, journal_directory, read_job, staging
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat, publish_unit
from tests.jobs import fake_job, model_without_weights, write_input


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_without_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards, of 40 and 10 rows: four units of up to 16 rows."""
    return write_input(tmp_path / "in", [40, 10])


@pytest.fixture
def spec(model: Path, source: Path, tmp_path: Path) -> JobSpec:
    return fake_job(model, source, tmp_path / "out")


@pytest.fixture
def units(spec: JobSpec) -> tuple[WorkUnit, ...]:
    """The first is committed with two dead letters, the second whole, the third not at all, the fourth with one."""
    first = prepare(spec)
    with RunRecord(first, "20260101T000000-aaaaaa") as record:
        record.begin()
    commit(first, first.pending[0], {1: "too_long", 2: "template_error"})
    commit(first, first.pending[1], {})
    commit(first, first.pending[3], {5: "too_long"})
    return first.pending


def commit(preparation: Preparation, unit: WorkUnit, dead: dict[int, str]) -> None:
    shard = next(shard for shard in preparation.plan.shards if shard.shard_id == unit.shard_id)
    rows = ParquetReader(locate, preparation.facts.schema).read_unit(shard, unit).table
    alive = [offset for offset in range(unit.num_rows) if offset not in dead]
    completions = [Completion(unit.row_id(offset), 0, "text", (1,), "stop", 3) for offset in alive]
    errors = [RowError(unit.row_id(offset), kind, "so it is") for offset, kind in dead.items()]
    part = PartFormat(preparation.fingerprint.digest, "run", preparation.facts.output_columns)
    publish_unit(preparation.output, unit, rows, completions, errors, part)


def changed(spec: JobSpec, block: str, **values: object) -> JobSpec:
    return spec.model_copy(update={block: getattr(spec, block).model_copy(update=values)})


def test_committed_units_with_dead_letters_are_to_do_and_nothing_else(
    spec: JobSpec, units: tuple[WorkUnit, ...]
) -> None:
    found = prepare_retry(spec)
    assert found.pending == (units[0], units[3])
    assert (found.plan_changed, found.is_new, found.superseded, found.unfit_errors) == (False, False, (), ())
    # What is counted from the start: the units that the retry does not touch.
    assert (found.num_units_committed, found.num_rows_committed, found.num_dead_letters) == (1, 16, 0)
    assert found.retry is not None
    assert (found.retry.num_dead_letters, found.retry.uncommitted, found.retry.changed) == (3, (units[2],), {})
    assert found.fingerprint == prepare(spec).fingerprint


@pytest.mark.parametrize(
    ("types", "which"), [(("too_long",), (0, 3)), (("template_error",), (0,)), (("null_prompt",), ())]
)
def test_units_without_a_dead_letter_of_the_types_are_left_alone(
    spec: JobSpec, units: tuple[WorkUnit, ...], types: tuple[str, ...], which: tuple[int, ...]
) -> None:
    found = prepare_retry(spec, types)
    assert found.pending == tuple(units[index] for index in which)
    assert found.num_dead_letters == 3 - sum((2, 0, 0, 1)[index] for index in which)


def test_limits_may_change_and_the_output_keeps_its_fingerprint(spec: JobSpec, units: tuple[WorkUnit, ...]) -> None:
    other = changed(changed(spec, "sampling", max_new_tokens=99), "model", max_model_len=300)
    other = changed(changed(other, "engine", max_batch_rows=1), "execution", rows_per_unit=3)
    found = prepare_retry(other)
    assert found.retry is not None
    assert found.retry.changed == {"model.max_model_len": ("null", "300"), "sampling.max_new_tokens": ("12", "99")}
    assert found.fingerprint == prepare(spec).fingerprint
    assert found.facts.max_model_len == 300
    assert found.pending == (units[0], units[3])
    scopes = {prepare_retry(it).retry.scope.journal_fingerprint for it in (spec, other)}  # type: ignore[union-attr]
    assert len(scopes | {found.fingerprint.digest}) == 3


def test_a_job_that_generates_something_else_is_told_what_differs(spec: JobSpec, units: tuple[WorkUnit, ...]) -> None:
    other = changed(changed(spec, "sampling", max_new_tokens=99, temperature=0.5), "output", columns=["id"])
    with pytest.raises(FingerprintMismatch, match=r"a retry may have another model\.max_model_len and") as refused:
        prepare_retry(other)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert lines == [
        'output.columns: null in the output, ["id"] in the job',
        "sampling.temperature: 0.0 in the output, 0.5 in the job",
    ]


def test_without_an_output_there_is_nothing_to_retry(spec: JobSpec, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no dead letters; `batchinfer run` comes first"):
        prepare_retry(spec)
    assert not (tmp_path / "out").exists()


def test_dead_letters_of_a_shard_that_is_gone_or_has_changed_stay(
    spec: JobSpec, units: tuple[WorkUnit, ...], source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "part-1.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        found = prepare_retry(spec)
    assert (found.pending, found.num_dead_letters) == ((units[0],), 1)
    assert "1 dead letters of 1 units cannot be tried: their shards are not in the input any more" in caplog.text
    pq.write_table(pq.read_table(source / "part-0.parquet").slice(1), source / "part-0.parquet")
    assert prepare_retry(spec).pending == ()


def test_an_input_that_moved_is_read_where_it_is_now(spec: JobSpec, units: tuple[WorkUnit, ...], source: Path) -> None:
    moved = source.rename(source.with_name("moved"))
    found = prepare_retry(changed(spec, "input", path=str(moved)))
    assert found.pending == (units[0], units[3])
    assert all(str(moved) in shard.uri for shard in found.plan.shards)


def test_dead_letters_whose_reasons_were_deleted_are_found(spec: JobSpec, units: tuple[WorkUnit, ...]) -> None:
    output = prepare(spec).output
    errors_part(output, units[0].unit_id).remove()
    assert prepare_retry(spec).pending == (units[0], units[3])
    assert prepare_retry(spec, ["reason_lost"]).pending == (units[0], units[3])


def test_a_retry_is_noted_once_per_retry_and_the_job_stays_what_it_was(
    spec: JobSpec, units: tuple[WorkUnit, ...]
) -> None:
    output = prepare(spec).output
    before = read_job(output)
    for run_id in ("retry-1", "retry-2"):
        note_retry(prepare_retry(changed(spec, "sampling", max_new_tokens=99), ["too_long"]), run_id)
    after = read_job(output)
    assert before is not None
    assert after is not None
    notes = after.pop("retries")
    assert after == before
    assert [note.pop("run") for note in notes] == ["retry-1", "retry-2"]
    assert all(note.pop("at") for note in notes)
    assert notes[0] == {
        "changed": {"sampling.max_new_tokens": ["12", "99"]},
        "error_types": ["too_long"],
        "num_units": 2,
        "num_dead_letters": 3,
    }


def test_a_retry_leaves_the_journals_of_units_that_run_will_go_on_with(
    spec: JobSpec, units: tuple[WorkUnit, ...]
) -> None:
    output = prepare(spec).output
    for unit in units:
        segment = journal_directory(output, unit.unit_id).child("run-00000001-000000.arrow")
        segment.write_replace(b"whatever", staging(output))
    with RunRecord(prepare_retry(spec), "20260101T000001-bbbbbb") as record:
        record.begin()
    assert journaled_units(output) == {units[0].unit_id, units[2].unit_id, units[3].unit_id}


def test_a_damaged_completions_part_stops_nothing(spec: JobSpec, units: tuple[WorkUnit, ...]) -> None:
    output = prepare(spec).output
    place = completions_part(output, units[0].unit_id)
    place.write_replace(place.read_bytes()[:-5], staging(output))
    assert prepare_retry(spec).pending == (units[3],)
    assert len(prepare(spec).pending) == 1
