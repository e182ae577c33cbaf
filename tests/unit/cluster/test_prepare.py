"""What is decided before a GPU is taken: is the job right, what does its output hold, which units are left."""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.cluster.prepare import Preparation, compare_with_output, prepare
from batchinfer.cluster.run_record import RunRecord
from batchinfer.errors import FingerprintMismatch, InputError, ModelError, OutputError, SpecError
from batchinfer.models.files import has_chat_template
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.records import Completion, RowError, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.location import Location
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


def changed(spec: JobSpec, block: str, **values: object) -> JobSpec:
    return spec.model_copy(update={block: getattr(spec, block).model_copy(update=values)})


def begin(preparation: Preparation) -> Location:
    """What a run writes before its first unit."""
    with RunRecord(preparation, "20260101T000000-aaaaaa") as record:
        record.begin()
    return preparation.output


def commit(preparation: Preparation, unit: WorkUnit, dead: tuple[int, ...] = ()) -> None:
    shard = next(shard for shard in preparation.plan.shards if shard.shard_id == unit.shard_id)
    rows = ParquetReader(locate, preparation.facts.schema).read_unit(shard, unit).table
    completions = [
        Completion(unit.row_id(offset), 0, "text", (1,), "stop", 3)
        for offset in range(unit.num_rows)
        if offset not in dead
    ]
    errors = [RowError(unit.row_id(offset), "too_long", "too long") for offset in dead]
    part = PartFormat(preparation.fingerprint.digest, "run", preparation.facts.output_columns)
    publish_unit(preparation.output, unit, rows, completions, errors, part)


# A new output ------------------------------------------------------------------------------------------


def test_of_a_new_output_every_unit_is_pending_and_nothing_is_written(spec: JobSpec, tmp_path: Path) -> None:
    found = prepare(spec)
    assert found.is_new
    assert found.plan_changed
    assert [unit.num_rows for unit in found.pending] == [16, 16, 8, 10]
    assert (found.num_units_committed, found.num_rows_committed, found.num_dead_letters) == (0, 0, 0)
    assert found.facts.output_columns == ("id", "prompt")
    assert found.facts.max_model_len == 512
    assert not (tmp_path / "out").exists()


def test_the_count_of_a_run_starts_from_what_the_output_holds(spec: JobSpec) -> None:
    first = prepare(changed(spec, "sampling", n=3))
    begin(first)
    commit(first, first.pending[0], dead=(1, 2))
    count = prepare(changed(spec, "sampling", n=3)).tally()
    assert (count.num_rows, count.num_units, count.samples_per_row) == (50, 4, 3)
    assert (count.num_rows_before, count.num_units_before, count.num_dead_letters_before) == (16, 1, 2)


def test_only_the_columns_that_are_read_are_in_the_schema(spec: JobSpec) -> None:
    found = prepare(changed(spec, "output", columns=["id"]))
    assert found.facts.output_columns == ("id",)
    assert sorted(found.facts.schema.names) == ["id", "prompt"]


# A resumed output --------------------------------------------------------------------------------------


def test_what_is_committed_is_not_pending(spec: JobSpec) -> None:
    first = prepare(spec)
    begin(first)
    commit(first, first.pending[1], dead=(0,))
    commit(first, first.pending[3])
    again = prepare(spec)
    assert not again.is_new
    assert not again.plan_changed
    assert again.pending == (first.pending[0], first.pending[2])
    assert (again.num_units_committed, again.num_rows_committed, again.num_dead_letters) == (2, 26, 1)


def test_another_unit_size_keeps_the_cut_of_shards_that_the_output_knows(spec: JobSpec, source: Path) -> None:
    first = prepare(spec)
    begin(first)
    commit(first, first.pending[0])
    pq.write_table(pa.table({"id": [1, 2, 3], "prompt": ["a", "b", "c"]}), source / "part-9.parquet")
    again = prepare(changed(spec, "execution", rows_per_unit=2))
    assert [unit.num_rows for unit in again.plan.units] == [16, 16, 8, 10, 2, 1]
    assert [unit.num_rows for unit in again.pending] == [16, 8, 10, 2, 1]


def test_what_changes_no_row_may_change(spec: JobSpec, source: Path) -> None:
    begin(prepare(spec))
    moved = source.rename(source.with_name("elsewhere"))
    other = changed(spec, "input", path=str(moved))
    other = changed(other, "cluster", replicas=2)
    other = changed(other, "engine", max_batch_rows=3)
    other = changed(other, "output", compression="snappy")
    again = prepare(other.model_copy(update={"name": "renamed"}))
    assert not again.is_new
    assert not again.plan_changed


def test_a_job_that_generates_something_else_is_refused_with_the_keys_that_differ(
    spec: JobSpec, tmp_path: Path
) -> None:
    begin(prepare(spec))
    other = changed(changed(spec, "sampling", temperature=0.7, seed=3), "output", columns=["id"])
    with pytest.raises(FingerprintMismatch) as raised:
        prepare(other)
    text = str(raised.value)
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert lines == [
        'output.columns: null in the output, ["id"] in the job',
        "sampling.seed: 0 in the output, 3 in the job",
        "sampling.temperature: 0.0 in the output, 0.7 in the job",
    ]
    assert str(tmp_path / "out") in text
    assert "choose another output.path" in text


def test_another_tokenizer_is_another_job(spec: JobSpec, tmp_path: Path) -> None:
    begin(prepare(spec))
    other = model_without_weights(tmp_path / "other", chat_template="{{ messages }}")
    with pytest.raises(FingerprintMismatch, match=r"model\.tokenizer_config\.json: "):
        prepare(changed(spec, "model", path=str(other)))


def test_a_crash_between_plan_and_job_leaves_a_new_output(spec: JobSpec, tmp_path: Path) -> None:
    begin(prepare(spec))
    (tmp_path / "out" / "_job" / "job.json").unlink()
    again = prepare(spec)
    assert again.is_new
    assert again.plan_changed
    assert len(again.pending) == 4


# Inputs that change ------------------------------------------------------------------------------------


def test_a_growing_folder_adds_its_new_units_alone(spec: JobSpec, source: Path) -> None:
    first = prepare(spec)
    begin(first)
    for unit in first.pending:
        commit(first, unit)
    assert prepare(spec).pending == ()
    pq.write_table(pa.table({"id": [100], "prompt": ["new"]}), source / "part-2.parquet")
    grown = prepare(spec)
    assert [unit.num_rows for unit in grown.pending] == [1]
    assert grown.plan_changed
    assert (grown.num_rows_committed, grown.plan.num_rows) == (50, 51)


def test_a_changed_shard_supersedes_what_is_committed_of_it(spec: JobSpec, source: Path) -> None:
    first = prepare(spec)
    begin(first)
    for unit in first.pending:
        commit(first, unit, dead=(0,))
    pq.write_table(pa.table({"id": [1, 2], "prompt": ["new", "rows"]}), source / "part-1.parquet")
    found = prepare(spec)
    assert found.superseded == (first.pending[3].unit_id,)
    assert [unit.num_rows for unit in found.pending] == [2]
    assert (found.num_rows_committed, found.num_dead_letters, found.plan.num_rows) == (40, 3, 42)
    assert found.plan_changed


def test_a_shard_that_is_gone_is_retired_and_its_parts_stay(spec: JobSpec, source: Path) -> None:
    first = prepare(spec)
    begin(first)
    for unit in first.pending:
        commit(first, unit)
    (source / "part-1.parquet").unlink()
    found = prepare(spec)
    assert [shard.path for shard in found.plan.retired] == ["part-1.parquet"]
    assert (found.superseded, found.pending) == ((), ())
    assert (found.plan.num_rows, found.num_rows_committed) == (40, 40)


def test_an_unreadable_shard_is_in_the_plan_by_name(spec: JobSpec, source: Path) -> None:
    whole = (source / "part-1.parquet").read_bytes()
    (source / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    found = prepare(spec)
    assert [shard.path for shard in found.plan.unreadable] == ["part-1.parquet"]
    assert [unit.num_rows for unit in found.pending] == [16, 16, 8]


# Models ------------------------------------------------------------------------------------------------


def test_the_fake_engine_needs_no_weights_and_a_real_one_does(spec: JobSpec) -> None:
    assert prepare(spec).facts.model.revision is None
    with pytest.raises(ModelError, match="no weights"):
        prepare(changed(spec, "engine", kind="auto"))


def test_token_ids_need_no_tokenizer(spec: JobSpec, tmp_path: Path, source: Path) -> None:
    bare = model_without_weights(tmp_path / "bare", with_tokenizer=False)
    with pytest.raises(ModelError, match="no tokenizer"):
        prepare(changed(spec, "model", path=str(bare)))
    for shard in source.iterdir():
        pq.write_table(pa.table({"ids": pa.array([[1, 2]], pa.list_(pa.int32()))}), shard)
    given = fake_job(bare, source, tmp_path / "out", prompt={"text": None, "token_ids": "ids"})
    assert len(prepare(given).pending) == 2


@pytest.mark.parametrize(
    "prompt", [{"chat": True}, {"text": None, "messages": "m"}, {"text": None, "template": "Say {{ prompt }}"}]
)
def test_a_chat_of_a_model_without_a_template_is_refused(
    tmp_path: Path, source: Path, prompt: Mapping[str, object]
) -> None:
    plain = model_without_weights(tmp_path / "plain", chat_template=None)
    with pytest.raises(ModelError, match=r"plain: the job applies a chat template and the model has none; set prompt"):
        prepare(fake_job(plain, source, tmp_path / "out", prompt=prompt))


def test_plain_text_needs_no_chat_template(tmp_path: Path, source: Path) -> None:
    plain = model_without_weights(tmp_path / "plain", chat_template=None)
    assert prepare(fake_job(plain, source, tmp_path / "out")).pending


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "{{ messages }}"}, True),
        ({"tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"})}, True),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
                )
            },
            True,
        ),
        ({"tokenizer_config.json": json.dumps({"chat_template": None})}, False),
        ({"chat_template.json": json.dumps({"chat_template": "{{ messages }}"})}, False),
        ({}, False),
    ],
    ids=["jinja", "config", "named", "null", "processor", "none"],
)
def test_a_chat_template_is_found_where_the_tokenizer_finds_it(
    tmp_path: Path, files: Mapping[str, str], expected: bool
) -> None:
    directory = model_without_weights(tmp_path / "model", chat_template=None)
    for name, content in files.items():
        if name == "tokenizer_config.json":
            content = json.dumps({**json.loads((directory / name).read_text()), **json.loads(content)})
        (directory / name).write_text(content)
    assert has_chat_template(directory) is expected
    assert bool(load_tokenizer(directory).chat_template) is expected


def test_more_than_the_model_was_made_for_is_refused(spec: JobSpec) -> None:
    with pytest.raises(ModelError, match=r"model\.max_model_len 513 is longer than the model's limit of 512"):
        prepare(changed(spec, "model", max_model_len=513))
    assert prepare(changed(spec, "model", max_model_len=100)).facts.max_model_len == 100


def test_completions_that_leave_no_room_for_a_prompt_are_refused(spec: JobSpec) -> None:
    with pytest.raises(ModelError, match=r"sampling\.min_new_tokens 512 leaves no room for a prompt"):
        prepare(changed(spec, "sampling", min_new_tokens=512, max_new_tokens=600))


# Inputs and outputs that do not do ---------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in", "in/out"])
def test_an_output_in_its_own_input_is_refused(spec: JobSpec, tmp_path: Path, place: str) -> None:
    with pytest.raises(OutputError, match="choose an"):
        prepare(changed(spec, "output", path=str(tmp_path / place)))
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["part-0.parquet", "part-1.parquet"]


def test_a_directory_with_foreign_files_is_no_output(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"holds thesis\.tex but no batchinfer job; choose an empty or a new"):
        prepare(spec)


def test_a_column_of_one_shard_that_does_not_fit_names_the_shard(spec: JobSpec, source: Path) -> None:
    pq.write_table(pa.table({"id": [1], "prompt": [7]}), source / "part-1.parquet")
    with pytest.raises(InputError, match=r"shard part-1\.parquet: column 'prompt' is int64, but prompt\.text needs"):
        prepare(spec)


def test_a_template_that_does_not_parse_is_refused(spec: JobSpec) -> None:
    with pytest.raises(SpecError, match=r"prompt\.template: line 1"):
        prepare(changed(spec, "prompt", text=None, template="{% if %}"))


def test_units_that_another_run_committed_meanwhile_are_seen_in_the_second_look(spec: JobSpec) -> None:
    first = prepare(spec)
    begin(first)
    commit(first, first.pending[0])
    second = compare_with_output(first.facts, first.output)
    assert second.pending == first.pending[1:]
    assert second.num_units_committed == 1
