"""A file too large for memory is put in one step: whole under its name, or not there."""

import errno
import os
from pathlib import Path

import pytest

from batchinfer.errors import OutputError
from batchinfer.storage import local
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import locate
from tests.outputs import NO_WAIT, memory_uri


def source(tmp_path: Path, content: bytes = b"new") -> str:
    path = tmp_path / "spool"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("is_remote", [False, True])
def test_it_replaces_what_is_there(tmp_path: Path, is_remote: bool) -> None:
    root = locate(memory_uri() if is_remote else str(tmp_path / "root"))
    place = root.child("some/file")
    place.write_replace(b"old", root.child("_tmp"))
    place.put_file(source(tmp_path))
    assert place.read_bytes() == b"new"
    assert os.path.exists(tmp_path / "spool") == is_remote


def test_a_missing_file_is_an_error_about_its_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="some/file"):
        locate(str(tmp_path), policy=NO_WAIT).child("some/file").put_file(str(tmp_path / "nothing"))


def test_a_failure_after_the_move_is_tried_again_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. the file is moved  2. its directory cannot be synced, once  3. the second try has nothing to move any more."""
    (tmp_path / "some").mkdir()
    path = source(tmp_path)
    sync, failures = local._sync_directory, [OSError(errno.EIO, "once")]

    def sync_directory(path: str) -> None:
        if failures:
            raise failures.pop()
        sync(path)

    monkeypatch.setattr(local, "_sync_directory", sync_directory)
    policy = RetryPolicy(max_attempts=2, initial_s=0.0, max_s=0.0)
    locate(str(tmp_path), policy=policy).child("some/file").put_file(path)
    assert (tmp_path / "some" / "file").read_bytes() == b"new"
    assert not failures
