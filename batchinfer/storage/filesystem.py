"""Any storage fsspec knows, behind ``Location``; the only module that imports fsspec.

``locate`` is the way in: local paths are served by ``local``, everything with another protocol from here.
"""

import io
import logging
import os
import posixpath
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from batchinfer.errors import JobError, ModelError, OutputError, PartExists, SpecError
from batchinfer.redact import redact
from batchinfer.storage.error_kinds import hub_problem
from batchinfer.storage.failures import RetryPolicy, attempt, lost_exclusive_create
from batchinfer.storage.local import LocalLocation
from batchinfer.storage.location import FoundFile, Location, checked_name

__all__ = ["RemoteLocation", "StorageOptions", "canonical_uri", "download_tree", "locate"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: What fsspec filesystems accept is theirs to define.
StorageOptions = Mapping[str, Any]

_LOCAL_PROTOCOLS = ("file://", "local://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
#: Weights in these formats run code when they are loaded; they are never fetched.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


def locate(
    uri: str,
    storage_options: StorageOptions | None = None,
    *,
    blames: type[JobError] = OutputError,
    policy: RetryPolicy | None = None,
) -> Location:
    """The location ``uri`` names: a local path (``~`` and ``file://`` understood) or any fsspec URI.

    ``blames`` is raised for mistakes about the path. No request is sent. Raises SpecError for a protocol that is
    unknown or whose package is missing, and for storage options that its filesystem refuses.
    """
    policy = policy or RetryPolicy()
    for prefix in _LOCAL_PROTOCOLS:
        if uri.startswith(prefix):
            uri = uri.removeprefix(prefix)
            break
    else:
        if "://" in uri or "::" in uri:
            return _locate_remote(uri, storage_options or {}, blames, policy)
    return LocalLocation(os.path.abspath(os.path.expanduser(uri)), blames, policy)


def canonical_uri(uri: str) -> str:
    """A spelling that is equal for equal places: links and ``..`` resolved, protocol aliases and credentials gone.

    No request is sent. Two names for one bucket (an endpoint, an alias of the storage's own) stay two.
    """
    location = uri.rpartition("::")[2]
    scheme, separator, rest = location.partition("://")
    if not separator or f"{scheme}://" in _LOCAL_PROTOCOLS:
        return os.path.realpath(os.path.expanduser(rest if separator else location))
    host_and_path = rest.partition("?")[0]
    if ":" in host_and_path.partition("@")[0]:
        host_and_path = host_and_path.rpartition("@")[2]
    return f"{_ALIASES.get(scheme, scheme)}://{posixpath.normpath(host_and_path)}"


def _locate_remote(uri: str, storage_options: StorageOptions, blames: type[JobError], policy: RetryPolicy) -> Location:
    protocol = uri.partition("::")[0].partition("://")[0]
    try:
        filesystem, path = url_to_fs(uri, **storage_options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        way_out = f"pip install 'batchinfer[{extra}]'" if extra else f"install its fsspec filesystem ({error})"
        raise SpecError(f"{redact(uri)}: no package for {protocol}:// is installed; {way_out}") from error
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{redact(uri)}: fsspec cannot open it ({redact(str(error))}); check the protocol and storage_options"
        ) from error
    if protocol != "hf":
        return RemoteLocation(filesystem, path.rstrip("/") or path, blames, policy)
    if blames is OutputError:
        raise OutputError(
            f"{redact(uri)}: the hub is read, not written to; choose another output.path, and upload what is there then"
        )
    return HubLocation(filesystem, path.rstrip("/") or path, blames, policy)


@dataclass(frozen=True, slots=True)
class RemoteLocation(Location):
    """A path of an fsspec filesystem, object stores above all: whole objects, no directories, no append.

    Listings are fetched afresh each time: fsspec would go on answering from what it saw first, and other
    machines write here too.
    """

    filesystem: fsspec.AbstractFileSystem
    path: str
    blames: type[JobError]
    policy: RetryPolicy

    @property
    def uri(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))

    def __str__(self) -> str:
        return redact(self.uri)

    def child(self, name: str) -> "RemoteLocation":
        path = f"{self.path.rstrip('/')}/{checked_name(name, str(self))}"
        return type(self)(self.filesystem, path, self.blames, self.policy)

    def is_file(self) -> bool:
        return self._attempt("is_file", lambda: bool(self._fresh().isfile(self.path)))

    def is_directory(self) -> bool:
        return self._attempt("is_directory", lambda: bool(self._fresh().isdir(self.path)))

    def size_bytes(self) -> int:
        return self._attempt("size_bytes", lambda: int(self._fresh().info(self.path)["size"]))

    def names(self) -> set[str]:
        try:
            listed = self._attempt("names", lambda: self._fresh().ls(self.path, detail=False), absent_ok=True)
        except FileNotFoundError:
            return set()
        # An object store may list the empty object that stands for the directory itself.
        own = self.path.strip("/")
        paths = (str(path).strip("/") for path in listed)
        return {path.rpartition("/")[2] for path in paths if path != own}

    def files(self) -> list[FoundFile]:
        try:
            found = self._attempt("files", lambda: self._fresh().find(self.path, detail=True), absent_ok=True)
        except FileNotFoundError:
            return []
        return self._relative(found)

    def glob(self, pattern: str) -> list[FoundFile]:
        full_pattern = f"{self.path.rstrip('/')}/{pattern}"
        try:
            found = self._attempt("glob", lambda: self._fresh().glob(full_pattern, detail=True), absent_ok=True)
        except FileNotFoundError:
            return []
        return self._relative(found)

    def read_bytes(self) -> bytes:
        return self._attempt("read_bytes", lambda: cast(bytes, self.filesystem.cat_file(self.path)))

    def read_range(self, first_byte: int, num_bytes: int) -> bytes:
        if num_bytes <= 0:
            return b""
        end = first_byte + num_bytes
        return self._attempt(
            "read_range", lambda: cast(bytes, self.filesystem.cat_file(self.path, start=first_byte, end=end))
        )

    def read_if_present(self) -> bytes | None:
        try:
            return self._attempt(
                "read_if_present", lambda: cast(bytes, self.filesystem.cat_file(self.path)), absent_ok=True
            )
        except FileNotFoundError:
            return None

    def open_random(self) -> BinaryIO:
        return cast(BinaryIO, _RangeFile(self, self.size_bytes()))

    def write_replace(self, content: bytes, staging: Location) -> None:
        # One put: readers see the old object or the new one; nothing is staged.
        self._attempt("write_replace", lambda: self.filesystem.pipe_file(self.path, content))

    def create_exclusive(self, content: bytes, staging: Location) -> None:
        """A conditional put, so of several writers one wins.

        Where a filesystem has none, fsspec checks for existence first: two writers within that instant may then
        both believe to have created the object; it is one whole object all the same. After a lost answer the
        retry finds the object this very call has put and raises PartExists: "there already" is true then too.
        """

        def create() -> None:
            try:
                self.filesystem.pipe_file(self.path, content, mode="create")
            except Exception as error:
                if lost_exclusive_create(error):
                    raise FileExistsError(self.path) from error
                raise

        try:
            self._attempt("create_exclusive", create)
        except FileExistsError as error:
            raise PartExists(f"{self} is there already") from error

    def put_file(self, local_path: str) -> None:
        # One object, in one put or one multipart upload: readers see the old object or the new one.
        self._attempt("put_file", lambda: self.filesystem.put_file(local_path, self.path))

    def remove(self) -> None:
        try:
            self._attempt("remove", lambda: self.filesystem.rm_file(self.path), absent_ok=True)
        except FileNotFoundError:
            return

    def remove_empty_directory(self) -> None:
        """Object stores have no directories."""

    def move_to(self, target: Location) -> None:
        destination = cast(RemoteLocation, target).path
        try:
            # Copy, then delete: a crash between leaves both, and the next move replaces the copy.
            self._attempt("move_to", lambda: self.filesystem.cp_file(self.path, destination), absent_ok=True)
        except FileNotFoundError:
            return
        self.remove()

    def download_to(self, local_path: str) -> None:
        self._attempt("download_to", lambda: self.filesystem.get_file(self.path, local_path))

    @property
    def can_append(self) -> bool:
        return False

    def append(self, content: bytes) -> None:
        raise NotImplementedError("object stores cannot append; write a new object")

    def _relative(self, found: Mapping[str, Mapping[str, Any]]) -> list[FoundFile]:
        root = self.path.strip("/") + "/"
        return sorted(
            (
                FoundFile(path.strip("/").removeprefix(root), int(details["size"]))
                for path, details in found.items()
                if details["type"] == "file" and path.strip("/").startswith(root)
            ),
            key=lambda file: file.name,
        )

    def _fresh(self) -> fsspec.AbstractFileSystem:
        self.filesystem.invalidate_cache()
        return self.filesystem

    def _attempt(self, name: str, operation: Callable[[], Result], *, absent_ok: bool = False) -> Result:
        return attempt(name, operation, self.uri, self.blames, self.policy, absent_ok=absent_ok)


class HubLocation(RemoteLocation):
    """A path in a repository of the Hugging Face hub, ``datasets/<namespace>/<name>[@<revision>]/<path>``; read only.

    Its filesystem answers no to ``isfile`` and ``isdir`` whatever went wrong, and reads ahead where only a range is
    asked for.
    """

    def is_file(self) -> bool:
        return self._type() == "file"

    def is_directory(self) -> bool:
        return self._type() == "directory"

    def read_range(self, first_byte: int, num_bytes: int) -> bytes:
        if num_bytes <= 0:
            return b""
        end = first_byte + num_bytes
        return self._attempt(
            "read_range",
            lambda: cast(bytes, self.filesystem.cat_file(self.path, start=first_byte, end=end, cache_type="none")),
        )

    def _type(self) -> str | None:
        try:
            return self._attempt("type", lambda: str(self._fresh().info(self.path)["type"]), absent_ok=True)
        except FileNotFoundError as error:
            problem = hub_problem(error)
            if problem is None:
                return None
            raise self.blames(f"{self}: {problem}") from error

    def _attempt(self, name: str, operation: Callable[[], Result], *, absent_ok: bool = False) -> Result:
        def asked() -> Result:
            try:
                return operation()
            except RuntimeError as error:
                # All threads share a client, which one that cannot connect closes.
                if "client has been closed" in str(error):
                    raise ConnectionError(str(error)) from error
                raise

        try:
            return super()._attempt(name, asked, absent_ok=absent_ok)
        except (ValueError, NotImplementedError) as error:
            raise self.blames(
                f"{self}: {error}; data sets are hf://datasets/<namespace>/<name>[@<revision>]/<path>"
            ) from error


class _RangeFile(io.RawIOBase):
    """A remote file as a seekable stream of ranged reads: each read is one request, retried on its own.

    fsspec's own file objects keep position and cache, and after a failed read neither can be trusted.
    """

    def __init__(self, location: RemoteLocation, size_bytes: int) -> None:
        super().__init__()
        self._location = location
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        remaining = max(0, self._size_bytes - self._position)
        num_bytes = remaining if size is None or size < 0 else min(size, remaining)
        content = self._location.read_range(self._position, num_bytes)
        self._position += len(content)
        return content


def download_tree(
    uri: str,
    target: Path,
    storage_options: StorageOptions | None = None,
    *,
    policy: RetryPolicy | None = None,
    max_parallel: int = 4,
) -> list[str]:
    """Copy every file below ``uri`` (a model directory) into ``target``; returns their relative names, sorted.

    Pickled weights are left out, each named in the log. May be repeated: a file whose size already fits is kept,
    each other one appears under its name only when whole. Raises ModelError when nothing is there.
    """
    source = locate(uri, storage_options, blames=ModelError, policy=policy)
    found = source.files()
    if not found:
        raise ModelError(f"{source}: no files there; model.path must be a directory with config.json and safetensors")
    wanted = [file for file in found if not file.name.lower().endswith(_PICKLE_SUFFIXES)]
    for file in found:
        if file not in wanted:
            log.info("%s/%s: not fetched, pickled weights are not loaded", source, file.name)

    def fetch(file: FoundFile) -> None:
        destination = target / checked_name(file.name, str(source))
        if destination.is_file() and destination.stat().st_size == file.size_bytes:
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(destination.name + ".partial")
        # A crash leaves the partial file; the next call writes it anew.
        source.child(file.name).download_to(str(partial))
        os.replace(partial, destination)

    with ThreadPoolExecutor(max_workers=max_parallel) as pool:
        list(pool.map(fetch, wanted))
    return [file.name for file in wanted]
