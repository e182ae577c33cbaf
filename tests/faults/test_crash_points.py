"""A death at every single call to storage of a small job, one after the other; then the job is continued.

Whatever call a process dies at, the next run ends with the rows of an undisturbed one, once each, and nothing is left
lying about. The default suite dies after the first two calls of each kind and in the middle of such local writes;
``make long`` after every call, in the middle of every write, and before every call.
"""

import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify, verify_deep
from batchinfer.errors import BatchinferError
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import COMPLETIONS, ERRORS, JOB
from batchinfer.storage.location import Location
from tests.faults.in_process import (
    Moment,
    Plan,
    Point,
    SimulatedCrash,
    crash_at,
    fail_always,
    fail_at,
    one_machine,
    points,
    run_quietly,
    running,
)
from tests.jobs import fake_job, model_without_weights
from tests.outputs import memory_uri

NUM_ROWS = 15
ROWS_PER_UNIT = 5
#: Empty prompts, the dead letters: two in the first unit, one in the second, none in the third.
DEAD_ROWS = (0, 4, 7)
NUM_UNITS = 3

NOTHING: frozenset[str] = frozenset()
#: What stays where no run sweeps: one that finds everything committed takes no lease, and replicas that outlive their
#: driver write behind the next one. No reader minds it.
UNSWEPT = frozenset({"lease.json", "tmp", "journal"})

Rows = list[dict[str, object]]


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    with one_machine():
        yield


@pytest.fixture(params=["local", "memory"])
def make_job(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], JobSpec]:
    """Builds the same job with an output of its own each time."""
    prompts = [[] if row in DEAD_ROWS else [5 + row, 6, 7] for row in range(NUM_ROWS)]
    table = pa.table({"id": range(NUM_ROWS), "prompt": pa.array(prompts, pa.list_(pa.int32()))})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    model = model_without_weights(tmp_path / "model", with_tokenizer=False)
    numbers = iter(range(10_000))

    def make() -> JobSpec:
        output = str(tmp_path / f"out-{next(numbers)}") if request.param == "local" else memory_uri()
        return fake_job(
            model,
            tmp_path / "in",
            output,
            prompt={"token_ids": "prompt", "text": None},
            sampling={"max_new_tokens": 12, "n": 2, "temperature": 1.0},
            output={"token_ids": True},
            execution={"rows_per_unit": ROWS_PER_UNIT, "journal_interval_s": 0.001},
            engine={"fake": {"tokens_per_s": 20_000.0}},
        )

    return make


def read(output: Location, directory: str) -> Rows:
    """The rows of every part, sorted."""
    rows: Rows = []
    for file in output.child(directory).files():
        with output.child(directory).child(file.name).open_random() as part:
            rows += pq.read_table(part).to_pylist()
    return sorted(rows, key=lambda row: (str(row["row_id"]), row.get("sample", 0)))


def check_as_if_undisturbed(spec: JobSpec, expected: tuple[Rows, Rows], *, may_leave: frozenset[str] = NOTHING) -> None:
    """Rows, dead letters and their reasons are those of an undisturbed run, and nothing else is left over."""
    report = verify_deep(spec.output.path)
    assert (report.verdict, report.findings) == ("complete_with_dead_letters", ())
    output = locate(spec.output.path)
    completions, errors = expected
    assert read(output, COMPLETIONS) == completions
    # How often a row was tried is the run's own affair.
    assert [{**row, "attempts": 0} for row in read(output, ERRORS)] == [{**row, "attempts": 0} for row in errors]
    left = {file.name.partition("/")[0] for file in output.child(JOB).files()}
    # An object store's events are written at the end of a run, which may have failed.
    assert left - may_leave - {"runs"} == {"job.json", "plan.parquet"}


def check_not_damaged(spec: JobSpec) -> None:
    """What a death leaves is a part of the whole."""
    if locate(f"{spec.output.path}/{JOB}/job.json").is_file():
        assert verify(spec.output.path).verdict != "damaged"


def undisturbed(spec: JobSpec) -> tuple[tuple[Rows, Rows], list[Point]]:
    result, plan = run_quietly(spec)
    assert (result.outcome, result.num_units_committed) == ("dead_letters", NUM_UNITS)
    output = locate(spec.output.path)
    expected = read(output, COMPLETIONS), read(output, ERRORS)
    assert (len(expected[0]), len(expected[1])) == (2 * (NUM_ROWS - len(DEAD_ROWS)), len(DEAD_ROWS))
    check_as_if_undisturbed(spec, expected)
    return expected, points(plan.calls(), spec.output.path)


def chosen(every: bool, points: list[Point], role: str) -> list[Point]:
    """All points of a process, or the first two of each kind."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for point in points:
        if point.role == role:
            seen[point.kind] += 1
            if every or seen[point.kind] <= 2:
                found.append(point)
    return found


WRITES = frozenset({"write_replace", "create_exclusive", "append"})


def moments(moment: Moment, points: list[Point], spec: JobSpec) -> Iterator[tuple[Point, Moment]]:
    for point in points:
        yield point, moment
        # Half a write is a state of its own, which object stores do not have.
        if moment == "after" and point.operation in WRITES and "://" not in spec.output.path:
            yield point, "halfway"


HOW_MANY = [
    pytest.param("after", False, id="first-of-a-kind"),
    pytest.param("after", True, id="after-each", marks=pytest.mark.slow),
    pytest.param("before", True, id="before-each", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("moment", "every"), HOW_MANY)
def test_a_driver_that_dies_at_any_call_is_continued_by_the_next_run(
    make_job: Callable[[], JobSpec], moment: Moment, every: bool
) -> None:
    """At every other call its replicas outlive it and go on beside the next run, as they do for seconds under Ray."""
    expected, points = undisturbed(make_job())
    died_at = set()
    for number, (point, now) in enumerate(moments(moment, chosen(every, points, "driver"), make_job())):
        spec = make_job()
        plan = Plan(crash_at(point, spec.output.path, now))
        outlive = bool(number % 2)
        with running(plan, outlive_the_driver=outlive) as run:
            with contextlib.suppress(SimulatedCrash):
                run(spec)
            if plan.processes[0].died_at is not None:
                died_at.add(point.kind)
            check_not_damaged(spec)
            result, _ = run_quietly(spec)
        assert result.outcome == "dead_letters", (point, now)
        is_swept = result.run_id and not outlive
        check_as_if_undisturbed(spec, expected, may_leave=NOTHING if is_swept else UNSWEPT)
    assert died_at == {point.kind for point in points if point.role == "driver"}


@pytest.mark.parametrize(("moment", "every"), HOW_MANY)
def test_a_replica_that_dies_at_any_call_is_replaced_within_the_run(
    make_job: Callable[[], JobSpec], moment: Moment, every: bool
) -> None:
    expected, points = undisturbed(make_job())
    died_at = set()
    for point, now in moments(moment, chosen(every, points, "replica-0"), make_job()):
        spec = make_job()
        plan = Plan(crash_at(point, spec.output.path, now))
        with running(plan) as run:
            result = run(spec)
        assert result.outcome == "dead_letters", (point, now)
        if plan.processes[1].died_at is not None:
            died_at.add(point.kind)
        # Its torn write stays to the next run, which knows that nobody else is writing there.
        check_as_if_undisturbed(spec, expected, may_leave=frozenset({"tmp"}))
    # How often the journal is written, and so removed, is a matter of time.
    assert died_at >= {point.kind for point in points if point.role == "replica-0" and "journal" not in point.place}


def one_of_each_kind(points: list[Point]) -> list[Point]:
    return list({(point.role == "driver", point.kind): point for point in reversed(points)}.values())


def test_an_error_that_passes_is_ridden_out_at_any_call_even_when_the_call_had_happened(
    make_job: Callable[[], JobSpec],
) -> None:
    expected, points = undisturbed(make_job())
    for point in one_of_each_kind(points):
        spec = make_job()
        plan = Plan(fail_at(point, spec.output.path, "after", lambda: TimeoutError("the answer was lost")))
        with running(plan) as run:
            assert run(spec).outcome == "dead_letters", point
        check_as_if_undisturbed(spec, expected)


FINAL_ERRORS = {
    "outage": lambda: ConnectionResetError("reset by peer"),
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "quota": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "denied": lambda: PermissionError(errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize(
    "name", ["outage", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "quota", "denied"))]
)
def test_storage_that_fails_for_good_at_any_call_loses_nothing_and_the_next_run_finishes(
    make_job: Callable[[], JobSpec], name: str
) -> None:
    """The run ends with an error that says why, or with units given up; a unit is committed whole or not at all."""
    expected, points = undisturbed(make_job())
    fails_only_writes = name in ("full", "quota")
    for point in one_of_each_kind(points):
        if fails_only_writes and point.operation not in WRITES:
            continue
        spec = make_job()
        plan = Plan(fail_always(point, spec.output.path, "before", FINAL_ERRORS[name]))
        with running(plan) as run:
            with contextlib.suppress(BatchinferError):
                assert run(spec).outcome in {"dead_letters", "unfinished"}, point
            check_not_damaged(spec)
            assert run_quietly(spec)[0].outcome == "dead_letters", point
        check_as_if_undisturbed(spec, expected, may_leave=UNSWEPT)
