"""The memory of speeds: it survives damage and keeps within its bounds."""

from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.speeds import MAX_KEPT, MAX_KEPT_ALIKE, kept_speeds, model_key, read_speeds, remember_speed, speeds_file
from tests.unit.survey.test_estimate import PROBE, RUN


def test_speeds_are_read_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "speeds.json"
    remember_speed(RUN, path)
    remember_speed(PROBE, path)
    assert read_speeds(path) == (RUN, PROBE)
    assert {file.name for file in path.parent.iterdir()} == {"speeds.json", "speeds.lock"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"format": 2, "speeds": []}',
        b'{"format": 1, "speeds": {}}',
        b'{"format": 1, "speeds": [1, {"model": "m"}, {"x": 1}]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_an_empty_one_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "speeds.json"
    path.write_bytes(content)
    assert read_speeds(path) == ()
    remember_speed(RUN, path)
    assert read_speeds(path) == (RUN,)


@pytest.mark.parametrize(
    "field", ['"replica_s": 0', '"replica_s": "fast"', '"source": "guess"', '"num_completions": -1', '"device": 7']
)
def test_an_entry_that_makes_no_sense_is_left_out(tmp_path: Path, field: str) -> None:
    path = tmp_path / "speeds.json"
    remember_speed(RUN, path)
    name = field.partition(":")[0]
    lines = [f"   {field}," if line.strip().startswith(name) else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert read_speeds(path) == ()


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remember_speed(RUN, tmp_path / "file" / "speeds.json")


def test_few_of_a_kind_are_kept_and_not_more_than_the_limit_in_all() -> None:
    alike = [replace(RUN, at=str(number)) for number in range(10)]
    assert [speed.at for speed in kept_speeds(alike)] == [str(number) for number in range(10 - MAX_KEPT_ALIKE, 10)]
    many = [replace(RUN, model=str(number)) for number in range(MAX_KEPT + 10)]
    assert [speed.model for speed in kept_speeds(many)] == [str(number) for number in range(10, MAX_KEPT + 10)]


def test_a_model_is_known_by_its_content_not_by_the_order_of_its_files() -> None:
    assert model_key({"a": "1", "b": "2"}) == model_key({"b": "2", "a": "1"}) != model_key({"a": "1", "b": "3"})


def test_the_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHINFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert speeds_file() == Path("/some/cache/batchinfer/speeds.json")
