"""Files of this machine and its mounts: durable atomic writes with the standard library alone."""

import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import pyarrow as pa

from batchinfer.errors import JobError, PartExists
from batchinfer.storage.failures import RetryPolicy, attempt
from batchinfer.storage.location import FoundFile, Location, checked_name

Result = TypeVar("Result")

#: What link() says on filesystems without hard links (FAT, some FUSE and network mounts).
_NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})


@dataclass(frozen=True, slots=True)
class LocalLocation(Location):
    """A path of the local filesystem; ``path`` is absolute."""

    path: str
    blames: type[JobError]
    policy: RetryPolicy

    @property
    def uri(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def child(self, name: str) -> "LocalLocation":
        return LocalLocation(os.path.join(self.path, checked_name(name, self.path)), self.blames, self.policy)

    def is_file(self) -> bool:
        return self._attempt("is_file", lambda: stat.S_ISREG(self._mode()))

    def is_directory(self) -> bool:
        return self._attempt("is_directory", lambda: stat.S_ISDIR(self._mode()))

    def size_bytes(self) -> int:
        return self._attempt("size_bytes", lambda: os.stat(self.path).st_size)

    def names(self) -> set[str]:
        try:
            return self._attempt("names", lambda: set(os.listdir(self.path)), absent_ok=True)
        except FileNotFoundError:
            return set()

    def files(self) -> list[FoundFile]:
        return self._attempt("files", lambda: sorted(_walk(self.path, ""), key=lambda file: file.name))

    def glob(self, pattern: str) -> list[FoundFile]:
        def matching() -> list[FoundFile]:
            found = set(glob.glob(pattern, root_dir=self.path, recursive=True))
            paths = [(name, os.path.join(self.path, name)) for name in sorted(found)]
            return [FoundFile(name, os.path.getsize(path)) for name, path in paths if os.path.isfile(path)]

        return self._attempt("glob", matching)

    def read_bytes(self) -> bytes:
        return self._attempt("read_bytes", lambda: _read(self.path))

    def read_range(self, first_byte: int, num_bytes: int) -> bytes:
        def read() -> bytes:
            with open(self.path, "rb") as file:
                file.seek(first_byte)
                return file.read(num_bytes)

        return self._attempt("read_range", read)

    def read_if_present(self) -> bytes | None:
        try:
            return self._attempt("read_if_present", lambda: _read(self.path), absent_ok=True)
        except FileNotFoundError:
            return None

    def open_random(self) -> pa.NativeFile:
        return self._attempt("open_random", lambda: pa.OSFile(self.path, "rb"))

    def write_replace(self, content: bytes, staging: Location) -> None:
        def replace() -> None:
            with self._staged(content, staging, "write_replace") as temporary:
                os.replace(temporary, self.path)
                # A crash before this line may still show the old file after a power loss, never a torn one.
                _sync_directory(os.path.dirname(self.path))

        self._attempt("write_replace", replace)

    def create_exclusive(self, content: bytes, staging: Location) -> None:
        """link() refuses to replace, so of several writers one wins.

        Without hard links: an existence check, then a rename. Two writers within that instant may then both
        believe to have created the file; it is one whole file all the same.
        """

        def create() -> None:
            with self._staged(content, staging, "create_exclusive") as temporary:
                try:
                    os.link(temporary, self.path)
                except FileExistsError:
                    raise
                except OSError as error:
                    if error.errno not in _NO_LINK_ERRNOS:
                        raise
                    if os.path.lexists(self.path):
                        raise FileExistsError(errno.EEXIST, "exists", self.path) from error
                    os.rename(temporary, self.path)
                _sync_directory(os.path.dirname(self.path))

        try:
            self._attempt("create_exclusive", create)
        except FileExistsError as error:
            raise PartExists(f"{self.path} is there already") from error

    def put_file(self, local_path: str) -> None:
        is_moved = False

        def put() -> None:
            nonlocal is_moved
            if not is_moved:
                _make_directory(os.path.dirname(self.path))
                with open(local_path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(local_path, self.path)
                is_moved = True
            _sync_directory(os.path.dirname(self.path))

        self._attempt("put_file", put)

    def remove(self) -> None:
        def unlink() -> None:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
                _sync_directory(os.path.dirname(self.path))

        self._attempt("remove", unlink)

    def remove_empty_directory(self) -> None:
        def remove() -> None:
            try:
                os.rmdir(self.path)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR}:
                    raise

        self._attempt("remove_empty_directory", remove)

    def move_to(self, target: Location) -> None:
        destination = target.uri

        def move() -> None:
            _make_directory(os.path.dirname(destination))
            with suppress(FileNotFoundError):
                os.replace(self.path, destination)
                _sync_directory(os.path.dirname(destination))
                _sync_directory(os.path.dirname(self.path))

        self._attempt("move_to", move)

    def download_to(self, local_path: str) -> None:
        self._attempt("download_to", lambda: shutil.copyfile(self.path, local_path))

    @property
    def can_append(self) -> bool:
        return True

    def append(self, content: bytes) -> None:
        end_bytes: int | None = None

        def add() -> None:
            nonlocal end_bytes
            _make_directory(os.path.dirname(self.path))
            with open(self.path, "ab") as file:
                end_bytes = file.tell() if end_bytes is None else end_bytes
                # What is behind it comes from a try of ours that failed: a file has one appending process.
                file.truncate(end_bytes)
                self._write(file, content, "append")

        self._attempt("append", add)

    def _mode(self) -> int:
        try:
            return os.stat(self.path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0

    @contextmanager
    def _staged(self, content: bytes, staging: Location, operation: str) -> Iterator[str]:
        """``content`` synced to a file in ``staging``, which is gone afterwards; a crash inside leaves it there."""
        _make_directory(staging.uri)
        _make_directory(os.path.dirname(self.path))
        temporary = os.path.join(staging.uri, f"{os.path.basename(self.path)}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                self._write(file, content, operation)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except Exception:
            _unlink(temporary)
            raise
        else:
            # Not in a finally: a simulated crash, which is no Exception, leaves the file as a real one does.
            _unlink(temporary)

    def _write(self, file: BinaryIO, content: bytes, operation: str) -> None:
        faults = self.policy.faults
        if faults is None:
            file.write(content)
            return
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        faults.halfway(operation, self.path)
        file.write(content[half:])

    def _attempt(self, name: str, operation: Callable[[], Result], *, absent_ok: bool = False) -> Result:
        return attempt(name, operation, self.path, self.blames, self.policy, absent_ok=absent_ok)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _walk(directory: str, prefix: str) -> Iterator[FoundFile]:
    """Files below, links followed; a directory that is missing yields nothing."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield FoundFile(prefix + entry.name, entry.stat().st_size)


def _make_directory(path: str) -> None:
    """Make ``path`` and its parents; each new name is synced into its parent, or a power loss could forget it."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directory(parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts cannot sync a directory; the file itself is synced, which is what they can give.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)
