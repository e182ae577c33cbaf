"""The files that ``input.path`` names, as they are listed now."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchinfer.errors import InputError
from batchinfer.redact import redact, without_query
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.input_formats import SUFFIXES, ChosenFormat, InputFormat, format_by_name, format_of
from batchinfer.storage.location import Location

log = logging.getLogger(__name__)

_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that is to be a shard. ``path`` is relative to the input path that found it."""

    path: str
    location: Location
    size_bytes: int
    format: InputFormat


def candidates(
    paths: Sequence[str], storage_options: StorageOptions | None, chosen: ChosenFormat, policy: RetryPolicy | None
) -> list[Candidate]:
    """The files of all paths, in the order of ``paths`` and sorted by name within one; all of one format.

    Raises InputError when a path is missing, names a file that another path names too, no file is found, or files of
    both formats are; StorageUnavailable when the storage fails.
    """
    found = [candidate for path in paths for candidate in _of_path(path, storage_options, chosen, policy)]
    _refuse_duplicates(found)
    if not found:
        kinds = SUFFIXES.values() if chosen == "auto" else (SUFFIXES[chosen],)
        expected = ", ".join(f"*{suffix}" for suffixes in kinds for suffix in suffixes)
        raise InputError(
            f"no shards in {_shown(paths)}: expected {expected} files (names with _ or . in front are skipped)"
        )
    other = next((it for it in found if it.format != found[0].format), None)
    if other is not None:
        raise InputError(
            f"input.path names shards of two formats: {found[0].location} is {found[0].format}, {other.location} is "
            f"{other.format}; set input.format to one of them, or name the files by a glob"
        )
    return found


def split_glob(path: str) -> tuple[str, str]:
    """(fixed prefix directory, pattern relative to it); the pattern is empty when the path is no glob."""
    scheme, separator, rest = path.rpartition("://")
    parts = rest.split("/")
    for index, part in enumerate(parts):
        if _GLOB_CHARACTERS & set(part):
            prefix = "/".join(parts[:index]) or ("/" if rest.startswith("/") else ".")
            return scheme + separator + prefix, "/".join(parts[index:])
    return path, ""


def _of_path(
    path: str, storage_options: StorageOptions | None, chosen: ChosenFormat, policy: RetryPolicy | None
) -> list[Candidate]:
    place = locate(path, storage_options, blames=InputError, policy=policy)
    if place.is_file():
        # Row ids and the plan are made of the name: no place for a signature, which would change them with every run.
        name = without_query(path).rstrip("/").rpartition("/")[2]
        return [Candidate(name, place, place.size_bytes(), format_of(name, chosen))]
    root_path, pattern = split_glob(path)
    # A directory whose name only looks like a glob is that directory, as the file above is that file.
    if pattern and not place.is_directory():
        root = locate(root_path, storage_options, blames=InputError, policy=policy)
        visible = [file for file in root.glob(pattern) if not _is_hidden(file.name)]
        if not visible:
            raise InputError(f"{redact(path)}: the glob matches no file; check it (** spans directories)")
        return [
            Candidate(file.name, root.child(file.name), file.size_bytes, format_of(file.name, chosen))
            for file in visible
        ]
    if not place.is_directory():
        raise InputError(f"{place}: no such file or directory; check input.path and its storage_options")
    visible = [file for file in place.files() if not _is_hidden(file.name)]
    known = [(file, named) for file in visible if (named := format_by_name(file.name)) is not None]
    taken = [(file, named) for file, named in known if chosen in ("auto", named)]
    others = sorted({file.name for file in visible} - {file.name for file, _ in taken})
    if others:
        wanted = "shards by their name" if chosen == "auto" else chosen
        log.info("%s: %d files that are not %s are left out, such as %s", place, len(others), wanted, others[0])
    return [Candidate(file.name, place.child(file.name), file.size_bytes, named) for file, named in taken]


def _refuse_duplicates(found: Iterable[Candidate]) -> None:
    seen: dict[str, Candidate] = {}
    for candidate in found:
        other = seen.setdefault(candidate.path, candidate)
        if other is candidate:
            continue
        if other.location.uri == candidate.location.uri:
            raise InputError(f"input.path names {candidate.location} twice; leave one out")
        raise InputError(
            f"{other.location} and {candidate.location} are both {candidate.path!r} relative to their input.path, and "
            "row ids are made of that; give a directory or a glob that holds both"
        )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(redact(path) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
