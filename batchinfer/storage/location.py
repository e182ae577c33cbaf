"""The seam to storage: a place in some filesystem, and the few things done there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from batchinfer.errors import OutputError


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file below a location; ``name`` is relative to it, with ``/`` between the parts."""

    name: str
    size_bytes: int


class Location(ABC):
    """A path that may be a file, a directory or nothing yet. Any number of threads may use one.

    Transient errors are retried inside; what is left arrives as StorageUnavailable, or as the JobError class
    the location was made with when only the user can help.
    """

    @property
    @abstractmethod
    def uri(self) -> str:
        """What ``locate`` opens again. May hold credentials: show ``str(location)`` instead."""

    @abstractmethod
    def __str__(self) -> str:
        """The path for people: no credentials."""

    @abstractmethod
    def child(self, name: str) -> "Location":
        """The place ``name`` (one or more parts) below this one; a name that would leave it raises."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether a file is there now."""

    @abstractmethod
    def is_directory(self) -> bool:
        """Whether a directory is there now; an object store's exists while objects are below it."""

    @abstractmethod
    def size_bytes(self) -> int:
        """Size of the file; raises when there is none."""

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the files and directories right below, in one listing; empty when there is no directory."""

    @abstractmethod
    def files(self) -> list[FoundFile]:
        """Every file below, at any depth, sorted by name; empty when there is no directory."""

    @abstractmethod
    def glob(self, pattern: str) -> list[FoundFile]:
        """The files below whose relative name matches, sorted by name; ``**`` spans directories."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The whole file; raises when there is none."""

    @abstractmethod
    def read_range(self, first_byte: int, num_bytes: int) -> bytes:
        """``num_bytes`` from ``first_byte``, fewer where the file ends."""

    @abstractmethod
    def read_if_present(self) -> bytes | None:
        """The whole file, or None when there is none."""

    @abstractmethod
    def open_random(self) -> "pa.NativeFile | BinaryIO":
        """The file for reading in any order. The caller closes it; one thread at a time."""

    @abstractmethod
    def write_replace(self, content: bytes, staging: "Location") -> None:
        """Put ``content`` here in one atomic step, replacing what is there. Durable on return.

        ``staging`` is a directory of the same filesystem for the bytes on their way. A crash leaves the old
        file or the new one whole, and perhaps a file in ``staging``.
        """

    @abstractmethod
    def create_exclusive(self, content: bytes, staging: "Location") -> None:
        """Put ``content`` here in one atomic step, or raise PartExists and leave what is there. Durable on return."""

    @abstractmethod
    def put_file(self, local_path: str) -> None:
        """Put a local file's content here in one atomic step, replacing what is there. Durable on return.

        For what is too large for memory. Where this place is local, so must both be on one filesystem, and the file is
        moved: it is gone from ``local_path``.
        """

    @abstractmethod
    def remove(self) -> None:
        """Remove the file; nothing happens when there is none."""

    @abstractmethod
    def remove_empty_directory(self) -> None:
        """Remove the directory when nothing is in it; nothing happens otherwise, nor where there are none."""

    @abstractmethod
    def move_to(self, target: "Location") -> None:
        """Move the file to ``target`` in the same filesystem, replacing; nothing happens when there is none."""

    @abstractmethod
    def download_to(self, local_path: str) -> None:
        """Copy the file to a local path, replacing; a crash leaves a partial file there."""

    @property
    @abstractmethod
    def can_append(self) -> bool:
        """Whether ``append`` works here; object stores know whole objects only."""

    @abstractmethod
    def append(self, content: bytes) -> None:
        """Add to the file's end, making it; a crash may leave a part of ``content``. One process at a time."""


def checked_name(name: str, parent: str) -> str:
    """``name`` when it stays below its parent directory, else OutputError."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        raise OutputError(f"{name!r} is no name for a file below {parent}: it would leave the directory")
    return name
