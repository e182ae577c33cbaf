"""Publishing a committed unit again: old rows stay, new ones join, and every crash leaves each row in one place."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify, verify_deep
from batchinfer.errors import OutputError
from batchinfer.records import Plan
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part, errors_part, staging
from batchinfer.storage.location import Location
from batchinfer.storage.republish import Republished, lacking_rows, republish_unit
from batchinfer.storage.writer import publish_unit
from tests.outputs import (
    PART,
    begin_job,
    completions_of,
    dead_letters_of,
    memory_uri,
    planned,
    publish,
    rows_table,
    write_shard,
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(write_shard(tmp_path / "in" / "a.parquet", 10).parent)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path, plan: Plan) -> Location:
    """One unit of ten rows of two samples; rows 2, 5 and 6 are dead letters."""
    output = locate(str(tmp_path / "out") if request.param == "local" else memory_uri())
    begin_job(output, plan, n=2)
    publish(output, plan, plan.units[0], dead=[2, 5, 6], n=2, part=replace(PART, n=2))
    return output


def ids(place: Location) -> list[object]:
    return read(place).column("id").to_pylist() if place.is_file() else []


def read(place: Location) -> pa.Table:
    return pq.read_table(pa.BufferReader(place.read_bytes()))


def test_new_rows_join_the_old_ones_in_order_and_the_rest_stays_dead(output: Location, plan: Plan) -> None:
    unit, part = plan.units[0], replace(PART, n=2, run_id="run-2")
    assert lacking_rows(output, unit).tolist() == [2, 5, 6]
    errors = dead_letters_of(unit, [5], "template_error")
    found = republish_unit(output, unit, rows_table(10), completions_of(unit, [6, 2], n=2)[::-1], errors, part)
    assert found == Republished(num_new_completions=4, num_dead_letters=1)
    table = read(completions_part(output, unit.unit_id))
    assert table.column("id").to_pylist() == [k for k in range(10) for _ in range(2) if k != 5]
    assert table.column("sample").to_pylist() == [0, 1] * 9
    assert table.schema.metadata[b"batchinfer.run_id"] == b"run-2"
    (left,) = read(errors_part(output, unit.unit_id)).to_pylist()
    assert (left["id"], left["text"], left["error_type"], left["attempts"]) == (5, "row 5", "template_error", 2)
    report = verify_deep(output.uri)
    assert (report.findings, report.remarks, report.num_dead_letters) == ((), (), 1)


def test_rows_that_were_not_tried_keep_their_reason(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2), (), replace(PART, n=2))
    errors = read(errors_part(output, unit.unit_id)).to_pylist()
    assert [(row["id"], row["error_type"], row["attempts"]) for row in errors] == [
        (5, "too_long", 1),
        (6, "too_long", 1),
    ]
    assert verify_deep(output.uri).findings == ()


def test_with_the_last_dead_letter_the_errors_part_goes(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    for rows in ([2], [5, 6]):
        republish_unit(output, unit, rows_table(10), completions_of(unit, rows, n=2), (), replace(PART, n=2))
    assert not errors_part(output, unit.unit_id).is_file()
    whole = locate(memory_uri())
    publish(whole, plan, unit, n=2, part=replace(PART, n=2))
    assert read(completions_part(output, unit.unit_id)).equals(read(completions_part(whole, unit.unit_id)))
    assert verify_deep(output.uri).verdict == "complete"


def test_a_row_that_is_completed_already_is_not_added_again(output: Location, plan: Plan) -> None:
    """The retry is repeated after an answer nobody heard, or another replica had the unit meanwhile."""
    unit, part = plan.units[0], replace(PART, n=2)
    republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2), (), part)
    before = read(completions_part(output, unit.unit_id))
    later = [replace(it, text="another") for it in completions_of(unit, [0, 2], n=2)]
    found = republish_unit(output, unit, rows_table(10), later, (), part)
    assert found == Republished(0, 2)
    assert read(completions_part(output, unit.unit_id)).equals(before)


def test_half_of_a_rows_samples_is_refused(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    with pytest.raises(ValueError, match="sample 1 where 0 was due"):
        republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2)[1:], (), PART)
    assert ids(completions_part(output, unit.unit_id)).count(2) == 0


def test_a_column_that_was_all_null_takes_the_values_of_new_rows(tmp_path: Path, plan: Plan) -> None:
    output, unit = locate(str(tmp_path / "out")), plan.units[0]
    begin_job(output, plan)
    nulls = rows_table(10).set_column(1, "text", pa.nulls(10))
    publish_unit(output, unit, nulls, completions_of(unit, range(9)), dead_letters_of(unit, [9]), PART)
    republish_unit(output, unit, rows_table(10), completions_of(unit, [9]), (), PART)
    assert read(completions_part(output, unit.unit_id)).column("text").to_pylist() == [None] * 9 + ["row 9"]


def test_a_job_that_passes_other_columns_is_told_which_are_missing(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    part = replace(PART, n=2, columns=("id",))
    with pytest.raises(OutputError, match=r"its part has the columns text, .* name them in output\.columns"):
        republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2), (), part)
    assert verify(output.uri).num_dead_letters == 3


def test_a_damaged_completions_part_is_not_replaced(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    place = completions_part(output, unit.unit_id)
    torn = place.read_bytes()[:-20]
    place.write_replace(torn, staging(output))
    with pytest.raises(OutputError, match="run `batchinfer verify`"):
        republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2), (), PART)
    assert place.read_bytes() == torn


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"PAR1" * 20])
def test_a_damaged_errors_part_costs_reasons_only(output: Location, plan: Plan, damage: object) -> None:
    unit = plan.units[0]
    place = errors_part(output, unit.unit_id)
    place.write_replace(damage(place.read_bytes()), staging(output))  # type: ignore[operator]
    republish_unit(output, unit, rows_table(10), completions_of(unit, [2], n=2), (), replace(PART, n=2))
    assert set(read(place).column("error_type").to_pylist()) == {"reason_lost"}
    assert ids(place) == [5, 6]
    assert verify_deep(output.uri).findings == ()
