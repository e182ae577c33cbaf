"""The directory that an export writes: its files appear whole, and a mark tells while the export is not.

A crash leaves the mark, and perhaps bytes below ``_tmp``. The same export run again begins anew there; any other finds
a directory that is not empty.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import BinaryIO

from batchinfer.errors import OutputError, StorageUnavailable
from batchinfer.storage.local import LocalLocation
from batchinfer.storage.location import Location

#: There while the export is under way, or was when it died. Like ``_tmp`` no reader of data sets looks at it.
INCOMPLETE = "_incomplete"
_STAGING = "_tmp"


class Target:
    """One export into ``place``. ``claim`` says which one, and is what the mark says."""

    def __init__(self, place: Location, claim: Mapping[str, object]) -> None:
        self._place = place
        self._mark = json.dumps(claim, sort_keys=True).encode() + b"\n"
        self._staging = place.child(_STAGING)
        self._names: list[str] = []

    def __str__(self) -> str:
        return str(self._place)

    @property
    def num_files(self) -> int:
        return len(self._names)

    def begin(self, *, overwrite: bool) -> None:
        """Mark the directory. Raises OutputError when something else is in it, unless it may be overwritten."""
        if self._place.is_file():
            raise OutputError(f"{self}: is a file; name a directory")
        names = sorted(name for name in self._place.names() if not name.startswith("."))
        if names and not overwrite and self._place.child(INCOMPLETE).read_if_present() != self._mark:
            found = f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            what = "an export that did not finish" if INCOMPLETE in names else "files already"
            raise OutputError(
                f"{self}: holds {what} ({found}); choose another directory, or say --overwrite to replace the files "
                "of an earlier export"
            )
        for file in self._staging.files():
            self._staging.child(file.name).remove()
        # Before the first file: from here on a crash is seen.
        self._place.child(INCOMPLETE).write_replace(self._mark, self._staging)

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A file to write from start to end; it appears when the block ends, and not at all when the block raises."""
        with self._spool() as path:
            with self._mapped(), open(path, "wb") as file:
                yield file
            self._place.child(name).put_file(path)
        self._names.append(name)

    def end(self, is_of_this_form: Callable[[str], bool]) -> None:
        """Remove what an earlier export of this form left beyond the files written now, then the mark."""
        for name in self._place.names() - set(self._names):
            # An earlier, longer export would otherwise leave rows twice.
            if is_of_this_form(name):
                self._place.child(name).remove()
        # A crash before this line leaves everything whole and the mark: the export is run again.
        self._place.child(INCOMPLETE).remove()
        self._staging.remove_empty_directory()

    def withdraw(self) -> None:
        """After an error that exporting again would meet again: without a file written, nothing is unfinished."""
        if not self._names:
            self._place.child(INCOMPLETE).remove()
            for directory in (self._staging, self._place):
                directory.remove_empty_directory()

    @contextmanager
    def _spool(self) -> Iterator[str]:
        """Where a file grows before it has its name: beside the target, or on this machine for an object store."""
        if isinstance(self._place, LocalLocation):
            path = self._staging.child(uuid.uuid4().hex).uri
            try:
                yield path
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            return
        directory = tempfile.mkdtemp(prefix="batchinfer-export-")
        try:
            yield os.path.join(directory, "file")
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            if isinstance(self._place, LocalLocation):
                os.makedirs(self._staging.uri, exist_ok=True)
            yield
        except OSError as error:
            raise StorageUnavailable(
                f"{self}: cannot be written ({error.strerror or error}); make room or check its permissions, and "
                "export again"
            ) from error
