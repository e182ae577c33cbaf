"""The directory an export writes: refused if something is in it, marked while it is not whole, whole or as before."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from batchinfer.errors import OutputError, StorageUnavailable
from batchinfer.export import export
from batchinfer.export.target import INCOMPLETE, Target
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import completions_part
from batchinfer.storage.local import LocalLocation
from tests.outputs import finished_job, memory_uri


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Killed(BaseException):
    """As if the process had died."""


def test_a_directory_with_something_in_it_is_refused_unless_asked(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / ".DS_Store").write_bytes(b"")
    export(str(output), str(tmp_path / "copy"))
    with pytest.raises(OutputError, match=r"holds files already \(part-00000\.parquet\).* --overwrite"):
        export(str(output), str(tmp_path / "copy"))
    before = (tmp_path / "copy" / "part-00000.parquet").stat().st_ino
    export(str(output), str(tmp_path / "copy"), overwrite=True)
    assert names(tmp_path / "copy") == [".DS_Store", "part-00000.parquet"]
    assert (tmp_path / "copy" / "part-00000.parquet").stat().st_ino != before
    with pytest.raises(OutputError, match="is a file"):
        export(str(output), str(tmp_path / "copy" / "part-00000.parquet"))


def test_an_export_that_died_is_seen_and_begun_anew_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the export dies while it writes  2. another one is refused  3. the same one again is whole."""
    output, _ = finished_job(tmp_path)
    copy = tmp_path / "copy"
    with monkeypatch.context() as patched:
        patched.setattr(LocalLocation, "put_file", lambda self, path: (_ for _ in ()).throw(Killed()))
        # The bytes on their way stay, as they do when a process dies.
        patched.setattr(os, "unlink", lambda path: None)
        with pytest.raises(Killed):
            export(str(output), str(copy), "jsonl")
    assert names(copy) == [INCOMPLETE, "_tmp"]
    assert names(copy / "_tmp") != []
    with pytest.raises(OutputError, match="holds an export that did not finish"):
        export(str(output), str(copy), "parquet")
    export(str(output), str(copy), "jsonl")
    assert names(copy) == ["part-00000.jsonl"]


def test_a_death_before_the_end_leaves_the_mark_beside_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = finished_job(tmp_path)

    def die(self: Target, is_of_this_form: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Target, "end", die)
        with pytest.raises(Killed):
            export(str(output), str(tmp_path / "copy"))
    assert INCOMPLETE in names(tmp_path / "copy")
    export(str(output), str(tmp_path / "copy"))
    assert names(tmp_path / "copy") == ["part-00000.parquet"]


def test_damage_found_before_the_first_file_leaves_nothing_behind(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path)
    completions_part(output, plan.units[0].unit_id).write_replace(b"PAR1", output.child("_job/tmp"))
    with pytest.raises(OutputError, match="damaged"):
        export(str(output), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_an_object_store_gets_whole_objects_and_no_mark_in_the_end(tmp_path: Path) -> None:
    output, _ = finished_job(tmp_path)
    target = memory_uri()
    before = set(os.listdir(tempfile.gettempdir()))
    export(str(output), target, "openai-batch")
    assert locate(target).names() == {"output.jsonl", "errors.jsonl"}
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("batchinfer-export-")]
    with pytest.raises(OutputError, match="holds files already"):
        export(str(output), target, "openai-batch")


def test_a_disk_without_room_says_so(tmp_path: Path) -> None:
    """/dev/full takes no byte."""
    target = Target(locate(str(tmp_path / "copy")), {})
    target.begin(overwrite=False)

    def write() -> None:
        with target.file("x") as file:
            with open("/dev/full", "wb") as full:
                os.dup2(full.fileno(), file.fileno())
            file.write(b"x" * 100_000)

    with pytest.raises(StorageUnavailable, match="No space left"):
        write()
    shutil.rmtree(tmp_path / "copy")
