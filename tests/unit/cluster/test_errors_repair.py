"""Errors parts that do not fit their commits: found by prepare, mended by the run, whatever spoilt them."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify, verify_deep
from batchinfer.cluster.errors_repair import mend_errors_parts
from batchinfer.cluster.prepare import Preparation, prepare
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import errors_part, staging
from batchinfer.storage.location import Location
from tests.jobs import fake_job, model_without_weights, write_input
from tests.unit.cluster.test_retry_prepare import commit


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    model = model_without_weights(tmp_path / "model")
    return fake_job(model, write_input(tmp_path / "in", [30]), tmp_path / "out")


@pytest.fixture
def finished(spec: JobSpec) -> Preparation:
    """Both units are committed; of the first one rows 2 and 3 are dead letters."""
    from batchinfer.cluster.run_record import RunRecord

    first = prepare(spec)
    with RunRecord(first, "20260101T000000-aaaaaa") as record:
        record.begin()
    commit(first, first.pending[0], {2: "too_long", 3: "empty_prompt"})
    commit(first, first.pending[1], {})
    return first


def of_another_attempt(output: Location, finished: Preparation) -> None:
    """A zombie had other dead letters and replaced the errors part after the commit of ours."""
    unit = finished.pending[0]
    place = errors_part(output, unit.unit_id)
    whole = place.read_bytes()
    other = Preparation(
        **{name: getattr(finished, name) for name in Preparation.__dataclass_fields__ if name != "output"},
        output=locate(str(output.uri) + "-other"),
    )
    commit(other, unit, {3: "template_error", 4: "too_long"})
    theirs = errors_part(other.output, unit.unit_id).read_bytes()
    assert theirs != whole
    place.write_replace(theirs, staging(output))


def torn(output: Location, finished: Preparation) -> None:
    place = errors_part(output, finished.pending[0].unit_id)
    place.write_replace(place.read_bytes()[:-7], staging(output))


def left_over(output: Location, finished: Preparation) -> None:
    """A unit without dead letters has an errors part: its writer died right before it could remove it."""
    whole = errors_part(output, finished.pending[0].unit_id).read_bytes()
    errors_part(output, finished.pending[1].unit_id).write_replace(whole, staging(output))


@pytest.mark.parametrize("spoil", [of_another_attempt, torn, left_over])
def test_what_does_not_fit_is_found_counted_right_and_mended(
    spec: JobSpec, finished: Preparation, spoil: Callable[[Location, Preparation], None]
) -> None:
    assert prepare(spec).is_settled
    spoil(finished.output, finished)
    unit = finished.pending[1 if spoil is left_over else 0]
    found = prepare(spec)
    assert (found.unfit_errors, found.num_dead_letters, found.is_settled) == ((unit,), 2, False)
    report = verify(finished.output.uri)
    assert (report.verdict, report.num_dead_letters, report.num_rows_completed) == ("incomplete", 2, 28)
    assert [finding.kind for finding in report.findings] == ["unfit_errors_part"]

    mend_errors_parts(found)
    assert prepare(spec).is_settled
    report = verify_deep(finished.output.uri)
    assert (report.verdict, report.findings, report.num_dead_letters) == ("complete_with_dead_letters", (), 2)
    errors = pq.read_table(Path(finished.output.uri) / "errors").to_pylist()
    assert [row["id"] for row in errors] == [2, 3]
    assert all(row["prompt"] for row in errors)
    reasons = {
        of_another_attempt: ["reason_lost", "template_error"],
        torn: ["reason_lost", "reason_lost"],
        left_over: ["too_long", "empty_prompt"],
    }
    assert [row["error_type"] for row in errors] == reasons[spoil]


def test_dead_letters_of_a_shard_that_is_gone_are_mended_without_their_input(
    spec: JobSpec, finished: Preparation, tmp_path: Path
) -> None:
    torn(finished.output, finished)
    (tmp_path / "in" / "part-0.parquet").rename(tmp_path / "part-0.parquet")
    write_input(tmp_path / "in", [0, 5])
    (tmp_path / "in" / "part-0.parquet").unlink()
    found = prepare(spec)
    assert [shard.path for shard in found.plan.retired] == ["part-0.parquet"]
    mend_errors_parts(found)
    errors = pq.read_table(tmp_path / "out" / "errors").to_pylist()
    assert [(row["id"], row["error_type"]) for row in errors] == [(None, "reason_lost")] * 2
