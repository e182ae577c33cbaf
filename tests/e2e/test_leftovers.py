"""A run with nothing to generate still clears what a crash left; no replica is started for it."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchinfer import verify_deep
from batchinfer.cluster import driver
from batchinfer.cluster.driver import run
from batchinfer.spec import JobSpec
from batchinfer.storage.filesystem import locate
from batchinfer.storage.lease import LeaseRecord, Process
from batchinfer.storage.location import Location
from tests.jobs import fake_job, model_without_weights, write_input

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def finished(tmp_path: Path) -> tuple[JobSpec, Location]:
    spec = fake_job(model_without_weights(tmp_path / "model"), write_input(tmp_path / "in", [20]), tmp_path / "out")
    assert run(spec).exit_code == 0
    return spec, locate(str(tmp_path / "out"))


def write(output: Location, name: str, content: bytes) -> None:
    output.child(name).write_replace(content, output.child("elsewhere"))
    output.child("elsewhere").remove_empty_directory()


def lease(silent_s: float) -> bytes:
    """Of another machine, which nobody here can look into."""
    beat = (datetime.now(UTC) - timedelta(seconds=silent_s)).isoformat()
    record = LeaseRecord("run-9", 1, beat, beat, 60.0, Process("gpu-17", 4242, "99", "another boot", "pid:[1]"))
    return json.dumps(asdict(record)).encode()


def names(output: Location) -> set[str]:
    return {file.name for file in output.child("_job").files() if not file.name.startswith("runs/")}


def test_leftovers_are_cleared_without_a_replica(
    finished: tuple[JobSpec, Location], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, output = finished
    before = names(output)
    unit_id = next(iter(output.child("completions").names())).removeprefix("part-").removesuffix(".parquet")
    write(output, "_job/lease.json", lease(silent_s=3600))
    write(output, "_job/tmp/half", b"half a part")
    write(output, f"_job/journal/{unit_id}/run-00000001-000000.arrow", b"torn")
    assert names(output) > before

    def refuse(*_: object) -> None:
        raise AssertionError("Ray is not needed to clear files")

    monkeypatch.setattr(driver, "connected", refuse)
    assert run(spec).exit_code == 0
    assert names(output) == before
    assert verify_deep(str(output)).exit_code == 0


def test_a_live_run_clears_its_own(finished: tuple[JobSpec, Location]) -> None:
    """It holds the output and is about to end: what it has there is its own business, and every row is committed."""
    spec, output = finished
    write(output, "_job/lease.json", lease(silent_s=0))
    write(output, "_job/tmp/half", b"half a part")
    assert run(spec).exit_code == 0
    assert {"lease.json", "tmp/half"} <= names(output)
