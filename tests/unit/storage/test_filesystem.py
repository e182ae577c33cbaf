"""Local and remote locations: atomic writes, one winner, names that stay inside, ranges, downloads."""

import errno
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from batchinfer.errors import InputError, ModelError, OutputError, PartExists, SpecError, StorageUnavailable
from batchinfer.storage.filesystem import RemoteLocation, canonical_uri, download_tree, locate
from batchinfer.storage.location import FoundFile, Location
from tests.outputs import NO_WAIT, memory_uri


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(str(tmp_path) if request.param == "local" else memory_uri(), policy=NO_WAIT)


@pytest.fixture
def staging(root: Location) -> Location:
    return root.child("_job/tmp")


class FailingFileSystem(MemoryFileSystem):
    """Raises the errors it is given, one per read, then works."""

    protocol = "failing"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.num_reads = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        self.num_reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return bytes(super().cat_file(path, start=start, end=end))


def test_a_written_file_reads_back_whole_and_by_range(root: Location, staging: Location) -> None:
    place = root.child("a/b.bin")
    place.write_replace(b"0123456789", staging)
    assert place.read_bytes() == b"0123456789"
    assert place.read_range(2, 3) == b"234"
    assert place.read_range(8, 100) == b"89"
    assert place.size_bytes() == 10
    assert place.is_file()
    assert not place.is_directory()
    assert root.child("a").is_directory()


def test_replace_leaves_the_new_file_and_nothing_beside_it(root: Location, staging: Location) -> None:
    place = root.child("a.bin")
    place.write_replace(b"old", staging)
    place.write_replace(b"new", staging)
    assert place.read_bytes() == b"new"
    assert [file for file in root.files() if not file.name.startswith("_job")] == [FoundFile("a.bin", 3)]
    assert staging.files() == []


def test_exclusive_create_refuses_to_replace(root: Location, staging: Location) -> None:
    place = root.child("completions/part.parquet")
    place.create_exclusive(b"first", staging)
    with pytest.raises(PartExists, match=r"part\.parquet is there already"):
        place.create_exclusive(b"second", staging)
    assert place.read_bytes() == b"first"
    assert staging.files() == []


def test_of_eight_threads_creating_one_file_exactly_one_wins(tmp_path: Path) -> None:
    for round_number in range(20):
        place = locate(str(tmp_path / f"{round_number}.bin"))
        start = threading.Barrier(8)
        winners: list[bytes] = []

        def create(content: bytes, place: Location = place, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                place.create_exclusive(content, locate(str(tmp_path / "tmp")))
            except PartExists:
                return
            winners.append(content)  # noqa: B023 - joined before the next round

        threads = [threading.Thread(target=create, args=(bytes([number]) * 1000,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert place.read_bytes() == winners[0]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_exclusive_create_still_refuses_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_link(source: str, target: str) -> None:
        raise OSError(number, "no hard links here", target)

    monkeypatch.setattr(os, "link", no_link)
    place, staging = locate(str(tmp_path / "a.bin")), locate(str(tmp_path / "tmp"))
    place.create_exclusive(b"first", staging)
    with pytest.raises(PartExists):
        place.create_exclusive(b"second", staging)
    assert place.read_bytes() == b"first"
    assert staging.files() == []


def test_a_write_that_fails_leaves_no_file_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    place = locate(str(tmp_path / "a.bin"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(StorageUnavailable, match=r"a\.bin: no space left"):
        place.create_exclusive(b"content", locate(str(tmp_path / "tmp")))
    assert not place.is_file()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_absent_things_are_absent_and_not_errors(root: Location) -> None:
    nothing = root.child("nothing")
    assert nothing.read_if_present() is None
    assert nothing.names() == set()
    assert nothing.files() == []
    assert not nothing.is_file()
    nothing.remove()
    nothing.move_to(root.child("elsewhere"))
    nothing.remove_empty_directory()
    assert not root.child("elsewhere").is_file()


def test_reading_what_is_not_there_blames_the_path(tmp_path: Path) -> None:
    for place in (locate(str(tmp_path / "no"), blames=InputError), locate(f"{memory_uri()}/no", blames=InputError)):
        with pytest.raises(InputError, match="no: not found"):
            place.read_bytes()


def test_listings_name_what_is_below(root: Location, staging: Location) -> None:
    for name in ("b.parquet", "sub/a.parquet", "sub/deep/c.txt"):
        root.child(f"in/{name}").write_replace(b"x" * len(name), staging)
    place = root.child("in")
    assert place.names() == {"b.parquet", "sub"}
    assert place.files() == [FoundFile("b.parquet", 9), FoundFile("sub/a.parquet", 13), FoundFile("sub/deep/c.txt", 14)]
    assert [file.name for file in place.glob("*.parquet")] == ["b.parquet"]
    assert [file.name for file in place.glob("**/*.parquet")] == ["b.parquet", "sub/a.parquet"]


def test_a_listing_sees_what_another_client_wrote_since(tmp_path: Path) -> None:
    uri = memory_uri()
    ours, theirs = locate(uri), locate(uri)
    staging = theirs.child("tmp")
    theirs.child("a").write_replace(b"", staging)
    assert ours.names() == {"a"}
    theirs.child("b").write_replace(b"", staging)
    assert ours.names() == {"a", "b"}


def test_move_takes_the_file_along(root: Location, staging: Location) -> None:
    root.child("a/x").write_replace(b"x", staging)
    root.child("a/x").move_to(root.child("b/c/x"))
    assert not root.child("a/x").is_file()
    assert root.child("b/c/x").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a//b", ".", "a\\b", "a\0b"])
def test_a_name_that_would_leave_the_directory_is_refused(root: Location, name: str) -> None:
    with pytest.raises(OutputError, match="would leave the directory"):
        root.child(name)


def test_random_reads_agree_with_the_file(root: Location, staging: Location) -> None:
    content = bytes(range(256)) * 4
    root.child("f").write_replace(content, staging)
    with root.child("f").open_random() as file:
        file.seek(100)
        assert file.read(5) == content[100:105]
        assert file.tell() == 105
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
        assert file.read(1) == b""


def test_append_adds_to_the_end_where_there_is_append(root: Location, tmp_path: Path) -> None:
    place = root.child("runs/r.jsonl")
    if not place.can_append:
        with pytest.raises(NotImplementedError):
            place.append(b"x")
        return
    place.append(b"one\n")
    place.append(b"two\n")
    assert place.read_bytes() == b"one\ntwo\n"


def test_a_locations_text_hides_credentials_and_its_uri_opens_again(root: Location, staging: Location) -> None:
    root.child("f").write_replace(b"x", staging)
    assert locate(root.child("f").uri).read_bytes() == b"x"
    assert pickle.loads(pickle.dumps(root)).child("f").read_bytes() == b"x"


def test_empty_directories_go_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").touch()
    for name in ("empty", "full"):
        locate(str(tmp_path / name)).remove_empty_directory()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_remote_reads_are_retried_then_given_up() -> None:
    filesystem = FailingFileSystem()
    filesystem.pipe_file("/f", b"content")
    place = RemoteLocation(filesystem, "/f", InputError, NO_WAIT)
    filesystem.errors = [TimeoutError("a"), ConnectionResetError("b")]
    assert place.read_bytes() == b"content"
    assert filesystem.num_reads == 3
    filesystem.errors = [TimeoutError("a")] * 3
    with pytest.raises(StorageUnavailable, match="still failing after 3 attempts"):
        place.read_range(0, 4)
    assert filesystem.errors == []


def test_a_missing_protocol_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SpecError, match=r"pip install 'batchinfer\[s3\]'"):
        locate("s3://key:secret@bucket/a")


def test_an_unknown_protocol_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match=r"nosuch://bucket: fsspec cannot open it .*nosuch"):
        locate("nosuch://bucket")


def test_local_spellings_name_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    expected = str((tmp_path / "out").resolve())
    for spelling in ("out", "./out/", "~/out", f"file://{tmp_path}/out", "x/../out"):
        assert locate(spelling).uri == str(tmp_path / "out")
        assert canonical_uri(spelling) == expected
    assert canonical_uri("link") == expected


def test_canonical_uris_drop_aliases_and_credentials() -> None:
    assert canonical_uri("s3a://bucket/a//b/") == "s3://bucket/a/b"
    assert canonical_uri("s3://key:secret@bucket/a") == canonical_uri("s3://bucket/x/../a") == "s3://bucket/a"


def source_tree(write: Callable[[str, bytes], None]) -> None:
    write("config.json", b"{}")
    write("sub/model.safetensors", b"weights")
    write("pytorch_model.bin", b"pickle")


def test_download_tree_fetches_all_but_pickles_and_may_be_repeated(
    root: Location, staging: Location, tmp_path: Path
) -> None:
    source_tree(lambda name, content: root.child(f"model/{name}").write_replace(content, staging))
    target = tmp_path / "cache"
    for _ in range(2):
        assert download_tree(root.child("model").uri, target) == ["config.json", "sub/model.safetensors"]
        assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == [
            "config.json",
            "sub/model.safetensors",
        ]
    (target / "config.json").write_bytes(b"torn off")
    download_tree(root.child("model").uri, target)
    assert (target / "config.json").read_bytes() == b"{}"


def test_download_tree_of_nothing_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no files there"):
        download_tree(memory_uri(), tmp_path)
