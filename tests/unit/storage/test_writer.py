"""Publishing a unit: what is in the parts, and what every crash and race leaves."""

import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.audit import verify
from batchinfer.errors import OutputError, PartExists, StorageUnavailable
from batchinfer.records import Completion, Plan, RowError, TokenLogprobs, WorkUnit
from batchinfer.storage import writer
from batchinfer.storage.dead_letters import look_at_dead_letters
from batchinfer.storage.filesystem import RemoteLocation, locate
from batchinfer.storage.layout import (
    COMPLETIONS,
    ERRORS,
    committed_units,
    completions_part,
    errors_part,
    parts,
    staging,
)
from batchinfer.storage.local import LocalLocation
from batchinfer.storage.location import Location
from batchinfer.storage.writer import PublishOutcome, publish_unit
from tests.outputs import (
    NO_WAIT,
    PART,
    begin_job,
    completions_of,
    dead_letters_of,
    memory_uri,
    num_dead_letters,
    planned,
    publish,
    rows_table,
    write_shard,
)


class SimulatedCrash(BaseException):
    """Ends a writer as SIGKILL would: no except clause of the code under test catches it."""


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path / "out") if request.param == "local" else memory_uri(), policy=NO_WAIT)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)


def read_part(place: Location) -> pa.Table:
    return pq.read_table(pa.BufferReader(place.read_bytes()))


def contents(output: Location) -> dict[str, bytes]:
    return {file.name: output.child(file.name).read_bytes() for file in output.files()}


def test_a_part_holds_passed_columns_and_generated_ones_sorted_by_row_and_sample(output: Location, plan: Plan) -> None:
    unit = plan.units[1]
    rows = rows_table(10, 10)
    completions = completions_of(unit, n=2)
    completions.reverse()
    part = replace(PART, columns=("text",), n=2)
    assert publish_unit(output, unit, rows, completions, [], part) is PublishOutcome.COMMITTED
    table = read_part(completions_part(output, unit.unit_id))
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("text", pa.string()),
            ("row_id", pa.string()),
            ("sample", pa.int32()),
            ("completion", pa.string()),
            ("finish_reason", pa.string()),
            ("num_prompt_tokens", pa.int32()),
            ("num_completion_tokens", pa.int32()),
        ]
    )
    assert table.column("row_id").to_pylist() == [unit.row_id(k) for k in range(10) for _ in range(2)]
    assert table.column("sample").to_pylist() == [0, 1] * 10
    assert table.column("text").to_pylist() == [f"row {10 + k}" for k in range(10) for _ in range(2)]
    assert table.column("completion").to_pylist() == [f"answer {k}.{s}" for k in range(10) for s in range(2)]
    assert set(table.column("num_completion_tokens").to_pylist()) == {3}
    assert not errors_part(output, unit.unit_id).is_file()
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    assert metadata == {
        "batchinfer.format_version": "1",
        "batchinfer.unit_id": unit.unit_id,
        "batchinfer.fingerprint": PART.fingerprint,
        "batchinfer.run_id": "run-1",
        "batchinfer.num_rows": "10",
        "batchinfer.num_completions": "20",
        "batchinfer.num_dead_letters": "0",
        "batchinfer.n": "2",
    }


def test_the_bytes_of_a_part_do_not_depend_on_the_order_rows_finished_in(tmp_path: Path, plan: Plan) -> None:
    unit = plan.units[0]
    written = []
    for name, step in (("a", 1), ("b", -1)):
        output = locate(str(tmp_path / name))
        completions = completions_of(unit, range(5), n=3)[::step]
        publish_unit(output, unit, rows_table(10), completions, dead_letters_of(unit, range(5, 10))[::step], PART)
        written.append(contents(output))
    assert written[0] == written[1]


def test_token_ids_and_logprobs_read_back(output: Location, plan: Plan) -> None:
    unit = plan.units[2]
    logprobs = (TokenLogprobs(7, -0.5, ((7, -0.5), (9, -1.5))), TokenLogprobs(8, -2.0))
    completions = [
        Completion(unit.row_id(0), 0, "x", (7, 8), "stop", 1, logprobs),
        Completion(unit.row_id(1), 0, "", (), "length", 1, ()),
        Completion(unit.row_id(2), 0, "", (), "length", 1, None),
        *completions_of(unit, range(3, 5)),
    ]
    publish_unit(output, unit, rows_table(5), completions, [], replace(PART, token_ids=True, logprobs=True))
    table = read_part(completions_part(output, unit.unit_id))
    assert table.column("token_ids").to_pylist()[:2] == [[7, 8], []]
    assert table.column("logprobs").to_pylist()[:3] == [
        [
            {
                "token_id": 7,
                "logprob": -0.5,
                "top": [{"token_id": 7, "logprob": -0.5}, {"token_id": 9, "logprob": -1.5}],
            },
            {"token_id": 8, "logprob": -2.0, "top": []},
        ],
        [],
        None,
    ]


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "lz4", "none"])
def test_every_compression_of_the_job_file_reads_back(
    tmp_path: Path, plan: Plan, compression: writer.Compression
) -> None:
    output = locate(str(tmp_path / "out"))
    publish(output, plan, plan.units[0], part=replace(PART, compression=compression))
    assert read_part(completions_part(output, plan.units[0].unit_id)).num_rows == 10


def test_a_unit_of_dead_letters_alone_is_committed_by_a_part_without_rows(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    assert publish(output, plan, unit, dead=range(10)) is PublishOutcome.COMMITTED
    assert read_part(completions_part(output, unit.unit_id)).num_rows == 0
    errors = read_part(errors_part(output, unit.unit_id))
    assert errors.slice(3, 1).to_pylist() == [
        {
            "row_id": unit.row_id(3),
            "id": 3,
            "text": "row 3",
            "error_type": "too_long",
            "error": "4097 tokens do not fit 4096",
            "attempts": 1,
        }
    ]
    assert committed_units(output) == {unit.unit_id}


def test_dead_letters_of_rows_that_could_not_be_read_have_no_input(output: Location, plan: Plan) -> None:
    """A damaged shard gave four rows of ten."""
    unit = plan.units[0]
    errors = dead_letters_of(unit, range(4, 10), "shard_corrupt")
    publish_unit(output, unit, rows_table(4), completions_of(unit, range(4)), errors, PART)
    assert read_part(errors_part(output, unit.unit_id)).column("id").to_pylist() == [None] * 6


def test_all_parts_together_are_one_data_set(tmp_path: Path, plan: Plan) -> None:
    output = locate(str(tmp_path / "out"))
    for unit in plan.units:
        publish(output, plan, unit, dead=range(unit.num_rows) if unit.first_row == 10 else (3,))
    table = pq.read_table(tmp_path / "out" / "completions")
    assert sorted(table.column("id").to_pylist()) == [k for k in range(25) if not 10 <= k < 20 and k not in (3, 23)]
    assert pq.read_table(tmp_path / "out" / "errors").num_rows == 12


def test_an_input_column_named_like_a_reason_stays_in_completions_and_gives_way_in_errors(
    output: Location, plan: Plan
) -> None:
    unit = plan.units[0]
    rows = rows_table(10).rename_columns(["id", "error"])
    part = replace(PART, columns=("id", "error"))
    publish_unit(output, unit, rows, completions_of(unit, range(9)), dead_letters_of(unit, [9]), part)
    assert read_part(completions_part(output, unit.unit_id)).column("error").to_pylist()[0] == "row 0"
    assert read_part(errors_part(output, unit.unit_id)).column("error").to_pylist() == ["4097 tokens do not fit 4096"]


@pytest.mark.parametrize(
    ("completed", "dead", "says"),
    [
        (range(9), [], "have no end or two"),
        (range(10), [3], "have no end or two"),
        (range(9), [9, 9], "have no end or two"),
        ([*range(10), 4], [], "sample 0 where 1 was due"),
    ],
    ids=["row missing", "row in both", "two dead letters", "sample twice"],
)
def test_a_unit_whose_rows_do_not_add_up_is_not_published(
    output: Location, plan: Plan, completed: list[int], dead: list[int], says: str
) -> None:
    unit = plan.units[0]
    with pytest.raises(ValueError, match=says):
        publish_unit(output, unit, rows_table(10), completions_of(unit, completed), dead_letters_of(unit, dead), PART)
    assert contents(output) == {}


def test_rows_of_another_unit_are_not_published(output: Location, plan: Plan) -> None:
    with pytest.raises(ValueError, match="does not belong to unit"):
        publish_unit(output, plan.units[0], rows_table(10), completions_of(plan.units[1]), [], PART)
    with pytest.raises(ValueError, match="which was not read"):
        publish_unit(output, plan.units[0], rows_table(9), completions_of(plan.units[0]), [], PART)
    assert contents(output) == {}


def test_no_part_is_written_outside_the_output(output: Location) -> None:
    unit = WorkUnit("../../../tmp/evil", 0, 1)
    with pytest.raises(OutputError, match="is no unit id"):
        publish_unit(output, unit, rows_table(1), completions_of(unit), [], PART)
    assert contents(output) == {}


def test_a_second_attempt_leaves_a_committed_unit_as_it_is(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    publish(output, plan, unit, dead=[1])
    before = contents(output)
    assert publish(output, plan, unit, dead=[2, 3]) is PublishOutcome.ALREADY_COMMITTED
    assert publish(output, plan, unit) is PublishOutcome.ALREADY_COMMITTED
    assert contents(output) == before


@pytest.mark.parametrize("dead_after_resume", [(), (5,)])
def test_crash_between_errors_part_and_commit_is_repaired_by_the_next_attempt(
    output: Location, plan: Plan, dead_after_resume: tuple[int, ...]
) -> None:
    """1. errors part of attempt 1 is written; 2. crash; 3. attempt 2 finds other dead letters, or none."""
    unit = plan.units[0]
    scratch = locate(memory_uri())
    publish(scratch, plan, unit, dead=[1, 2, 3])
    name = errors_part(scratch, unit.unit_id).read_bytes()
    errors_part(output, unit.unit_id).write_replace(name, staging(output))
    assert committed_units(output) == set()

    assert publish(output, plan, unit, dead=dead_after_resume) is PublishOutcome.COMMITTED
    part = errors_part(output, unit.unit_id)
    found = read_part(part).column("id").to_pylist() if part.is_file() else []
    assert found == list(dead_after_resume)


def test_a_crash_at_every_write_leaves_a_state_from_which_a_resume_gives_the_same_output(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at the k-th durable step of a unit with dead letters, for every k, before it and after it."""
    unit = plan.units[0]
    undisturbed = locate(str(tmp_path / "undisturbed"))
    publish(undisturbed, plan, unit, dead=[1, 2])
    wanted = contents(undisturbed)
    steps = ["write_replace", "create_exclusive"]
    for number, step in enumerate(steps):
        for after in (False, True):
            output = locate(str(tmp_path / f"{number}{after}"))
            original = getattr(LocalLocation, step)

            def dying(
                self: LocalLocation,
                content: bytes,
                staging: Location,
                original: object = original,
                after: bool = after,
            ) -> None:
                if after:
                    original(self, content, staging)  # type: ignore[operator]
                raise SimulatedCrash

            with monkeypatch.context() as patched:
                patched.setattr(LocalLocation, step, dying)
                with pytest.raises(SimulatedCrash):
                    publish(output, plan, unit, dead=[1, 2])
            publish(output, plan, unit, dead=[1, 2])
            assert contents(output) == wanted, (step, after)


def test_a_crash_inside_the_atomic_write_leaves_only_a_staged_file(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL between fsync and link: no cleanup runs, so the staged file stays and the part is not there."""
    output = locate(str(tmp_path / "out"))

    with monkeypatch.context() as patched:

        def no_cleanup(*args: object) -> None:
            raise SimulatedCrash

        def killed(*args: object) -> None:
            patched.setattr("os.unlink", no_cleanup)
            raise SimulatedCrash

        patched.setattr("os.link", killed)
        with pytest.raises(SimulatedCrash):
            publish(output, plan, plan.units[0])
    left = [file.name for file in output.files()]
    assert len(left) == 1
    assert left[0].startswith("_job/tmp/part-")
    assert committed_units(output) == set()
    assert publish(output, plan, plan.units[0]) is PublishOutcome.COMMITTED


def test_a_storage_failure_leaves_the_unit_uncommitted_and_the_attempt_may_be_repeated(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = locate(memory_uri(), policy=NO_WAIT)

    def failing(self: RemoteLocation, content: bytes, staging: Location) -> None:
        raise StorageUnavailable("try later")

    with monkeypatch.context() as patched:
        patched.setattr(RemoteLocation, "create_exclusive", failing)
        with pytest.raises(StorageUnavailable):
            publish(output, plan, plan.units[0])
    assert committed_units(output) == set()
    assert publish(output, plan, plan.units[0]) is PublishOutcome.COMMITTED


def test_of_eight_replicas_publishing_one_unit_one_commits_and_the_output_is_whole(tmp_path: Path) -> None:
    """They disagree which rows are dead letters, as replicas with failing hardware may."""
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 10))
    for round_number in range(10):
        output = locate(str(tmp_path / f"out{round_number}"))
        begin_job(output, plan)
        start = threading.Barrier(8)
        outcomes: list[PublishOutcome] = []

        def replica(number: int, output: Location = output, start: threading.Barrier = start) -> None:
            start.wait()
            outcomes.append(publish(output, plan, plan.units[0], dead=[number]))  # noqa: B023 - joined in the round

        threads = [threading.Thread(target=replica, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count(PublishOutcome.COMMITTED) == 1
        assert len(outcomes) == 8
        assert verify(output.uri).findings == ()


def test_the_loser_of_the_commit_fits_the_errors_part_to_the_winners_rows(
    output: Location, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. we see no commit; 2. the winner publishes with dead letters 1, 2; 3. we write errors 2, 3; 4. we lose."""
    unit = plan.units[0]
    kind = type(output)
    create_exclusive = kind.create_exclusive

    def lose(self: Location, content: bytes, staging: Location) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(kind, "create_exclusive", create_exclusive)
            winner_errors = errors_part(output, unit.unit_id).read_bytes()
            publish(output, plan, unit, dead=[1, 2])
            errors_part(output, unit.unit_id).write_replace(winner_errors, staging)
        raise PartExists("lost")

    monkeypatch.setattr(kind, "create_exclusive", lose)
    ours = [RowError(unit.row_id(2), "engine_error", "killed it twice", 2), *dead_letters_of(unit, [3])]
    outcome = publish_unit(output, unit, rows_table(10), completions_of(unit, [0, 1, 4, 5, 6, 7, 8, 9]), ours, PART)
    assert outcome is PublishOutcome.ALREADY_COMMITTED
    errors = read_part(errors_part(output, unit.unit_id)).to_pylist()
    assert [(row["id"], row["error_type"], row["attempts"]) for row in errors] == [
        (1, "reason_lost", 1),
        (2, "engine_error", 2),
    ]
    assert 3 in read_part(completions_part(output, unit.unit_id)).column("id").to_pylist()


def test_the_loser_of_the_commit_keeps_the_winners_reasons(
    output: Location, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. we see no commit; 2. the winner publishes with dead letters 1, 2; 3. we, who have none, lose."""
    unit = plan.units[0]
    kind = type(output)
    create_exclusive = kind.create_exclusive

    def lose(self: Location, content: bytes, staging: Location) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(kind, "create_exclusive", create_exclusive)
            publish(output, plan, unit, dead=[1, 2])
        raise PartExists("lost")

    monkeypatch.setattr(kind, "create_exclusive", lose)
    outcome = publish_unit(output, unit, rows_table(10), completions_of(unit), [], PART)
    assert outcome is PublishOutcome.ALREADY_COMMITTED
    errors = read_part(errors_part(output, unit.unit_id)).to_pylist()
    assert [(row["id"], row["error_type"]) for row in errors] == [(1, "too_long"), (2, "too_long")]


def test_a_writer_that_dies_over_a_lost_commit_removes_no_reason_of_the_winner(
    output: Location, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit with dead letters is always behind an errors part: that is what a resume counts by."""
    unit = plan.units[0]
    kind = type(output)
    create_exclusive = kind.create_exclusive

    def lose_and_die(self: Location, content: bytes, staging: Location) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(kind, "create_exclusive", create_exclusive)
            publish(output, plan, unit, dead=[1, 2])
        raise SimulatedCrash

    begin_job(output, plan)
    monkeypatch.setattr(kind, "create_exclusive", lose_and_die)
    with pytest.raises(SimulatedCrash):
        publish_unit(output, unit, rows_table(10), completions_of(unit), [], PART)
    assert num_dead_letters(output) == 2


def test_dead_letters_of_an_attempt_that_died_are_removed_behind_the_commit(output: Location, plan: Plan) -> None:
    unit = plan.units[0]
    scratch = locate(memory_uri())
    publish(scratch, plan, unit, dead=[1, 2, 3])
    left = errors_part(scratch, unit.unit_id).read_bytes()
    errors_part(output, unit.unit_id).write_replace(left, staging(output))
    publish(output, plan, unit)
    assert not errors_part(output, unit.unit_id).is_file()
    # As a crash right behind the commit leaves it: no dead letter is counted, and the part is known not to fit.
    errors_part(output, unit.unit_id).write_replace(left, staging(output))
    found = look_at_dead_letters(output, parts(output, COMPLETIONS), parts(output, ERRORS))
    assert (found.total, found.unfit) == (0, (unit.unit_id,))
