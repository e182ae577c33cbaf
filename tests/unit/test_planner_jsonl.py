"""Inputs of JSON Lines: which files are taken, how a format is chosen, one schema over all shards."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchinfer.cluster.prepare import prepare
from batchinfer.errors import InputError, SpecError
from batchinfer.job_file import parse_job
from batchinfer.planner import columns_to_read, plan_input
from batchinfer.storage import jsonl_scan, jsonl_stream
from batchinfer.storage.input_formats import ChosenFormat
from batchinfer.storage.jsonl_types import Survey
from tests.jobs import fake_job, job_values, model_without_weights
from tests.outputs import write_shard


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def names(path: Path | str, chosen: ChosenFormat = "auto") -> list[str]:
    return [shard.path for shard in plan_input([str(path)], None, 10, None, chosen).plan.shards]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_without_weights(tmp_path_factory.mktemp("model"))


def test_a_directory_gives_what_its_names_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.ndjson", "deep/a.JSONL", "_job/c.jsonl", ".d.jsonl", "notes.json"):
        write_lines(tmp_path / name, {"a": 1})
    with caplog.at_level("INFO"):
        assert names(tmp_path) == ["b.ndjson", "deep/a.JSONL"]
    assert "1 files that are not shards by their name are left out, such as notes.json" in caplog.text


def test_two_formats_have_to_be_chosen_from(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", {"id": 1})
    write_shard(tmp_path / "in" / "b.parquet", 3)
    with pytest.raises(InputError, match=r"a\.jsonl is jsonl, .*b\.parquet is parquet; set input\.format to one of"):
        names(tmp_path / "in")
    assert names(tmp_path / "in", "jsonl") == ["a.jsonl"]
    assert names(tmp_path / "in", "parquet") == ["b.parquet"]
    assert names(f"{tmp_path}/in/*.jsonl") == ["a.jsonl"]
    with pytest.raises(InputError, match="shards of two formats"):
        plan_input([f"{tmp_path}/in/a.jsonl", f"{tmp_path}/in/b.parquet"], None, 10)


def test_a_name_that_says_nothing_is_what_the_job_says(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.txt", {"id": 1})
    assert names(tmp_path / "rows.txt", "jsonl") == ["rows.txt"]
    assert names(f"{tmp_path}/*.txt", "jsonl") == ["rows.txt"]
    with pytest.raises(InputError, match=r"no Parquet footer.*set input\.format: jsonl"):
        names(tmp_path / "rows.txt")
    with pytest.raises(InputError, match=r"no shards in .*: expected \*\.jsonl, \*\.jsonl\.gz, .* files"):
        names(tmp_path, "jsonl")


def test_keys_of_all_shards_make_one_schema_and_missing_ones_are_null(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"id": 1, "meta": {"x": 1}})
    write_lines(tmp_path / "b.jsonl", {"id": 1.5, "meta": {"y": "s"}, "late": [None]}, {"id": None})
    found = plan_input([str(tmp_path)], None, 10)
    schema, passed = columns_to_read(found.schemas, {"late"}, None)
    meta = pa.struct([("x", pa.int64()), ("y", pa.string())])
    assert schema == pa.schema([("id", pa.float64()), ("meta", meta), ("late", pa.list_(pa.string()))])
    assert passed == ("id", "meta", "late")


def test_a_prompt_column_without_one_type_is_refused_and_others_become_texts(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"id": 1, "prompt": "x"}, {"id": "two", "prompt": "y"})
    found = prepare(fake_job(model, source, tmp_path / "out"))
    assert found.facts.schema.field("id").type == pa.string()
    assert "column 'id' holds integers and strings; its values are written as JSON texts" in caplog.text
    template = {"text": None, "template": "{{ id }}: {{ prompt }}"}
    with pytest.raises(InputError, match="column 'id', of which prompts are made, holds integers and strings in"):
        prepare(fake_job(model, source, tmp_path / "out", prompt=template))


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ({"text": "p"}, [{"p": "x"}, {"p": 5}]),
        ({"text": None, "messages": "p"}, [{"p": [{"role": "user", "content": "x"}]}, {"p": "x"}, {"p": None}]),
        ({"text": None, "messages": "p"}, [{"p": [{"role": "user", "content": "x"}]}, {"p": [{"role": 5}]}]),
        ({"text": None, "turns": "p"}, [{"p": ["x", "y"]}, {"p": "x"}, {"p": [1]}]),
        ({"text": None, "token_ids": "p"}, [{"p": [1, 2]}, {"p": "1 2"}, {"p": []}]),
    ],
)
def test_rows_of_another_type_than_the_prompt_needs_do_not_stop_the_job(
    tmp_path: Path, model: Path, prompt: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", *rows)
    found = prepare(fake_job(model, source, tmp_path / "out", prompt=prompt))
    assert found.plan.num_rows == len(rows)


def test_a_column_that_is_never_what_the_prompt_needs_stops_it(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"prompt": 1}, {"prompt": 2})
    with pytest.raises(InputError, match=r"column 'prompt' is int64, but prompt\.text needs string"):
        prepare(fake_job(model, source, tmp_path / "out"))


def test_too_many_keys_are_an_input_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {f"k{number}": 1 for number in range(1001)})
    with pytest.raises(InputError, match="more than a thousand different keys"):
        plan_input([str(tmp_path)], None, 10)


def test_formats_have_names() -> None:
    values = job_values("model", "in", "out")
    assert parse_job(values).input.format == "auto"
    with pytest.raises(SpecError, match=r"input\.format"):
        parse_job({**values, "input": {"path": "in", "format": "csv"}})


def test_planning_a_large_file_can_be_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives in the main thread while threads of two kinds are at work; the rest would take 40 s."""
    monkeypatch.setattr(jsonl_stream, "_FIRST_BLOCK_BYTES", 20)
    monkeypatch.setattr(jsonl_stream, "_BLOCK_BYTES", 20)
    begun = threading.Event()

    def slowly(block: bytes, *_: object) -> jsonl_scan._ScannedBlock:
        begun.set()
        time.sleep(0.02 * (os.cpu_count() or 1))
        return jsonl_scan._ScannedBlock(1, 1, 0, Survey())

    monkeypatch.setattr(jsonl_scan, "_scan_block", slowly)
    write_lines(tmp_path / "a.jsonl", *({"id": number} for number in range(2000)))
    main_thread = threading.get_ident()
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signaller = threading.Thread(target=lambda: begun.wait() and signal.pthread_kill(main_thread, signal.SIGINT))
    signaller.start()
    started_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            plan_input([str(tmp_path)], None, 10)
    finally:
        signal.signal(signal.SIGINT, before)
    signaller.join()
    assert time.monotonic() - started_s < 10
