"""That a job does not read what it writes. Names only, no requests."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from batchinfer.errors import OutputError
from batchinfer.planner.listing import split_glob
from batchinfer.redact import redact
from batchinfer.storage.filesystem import canonical_uri


def check_output_apart(input_paths: Sequence[str], output_path: str) -> None:
    """OutputError when the output would lie inside the input, the input inside the output, or both are one.

    No request is sent. A glob that cannot reach below the output (``data/*.parquet`` with ``data/out``) is fine.
    """
    output = canonical_uri(output_path)
    # As a glob and as a name that only looks like one: no request is sent, so it might be either.
    readings = [(path, *reading) for path in input_paths for reading in dict.fromkeys((split_glob(path), (path, "")))]
    for path, root, pattern in readings:
        source = canonical_uri(root)
        shown_input, shown_output = f"input.path {redact(path)}", f"output.path {redact(output_path)}"
        if output == source:
            raise OutputError(f"{shown_output} is where {shown_input} lies; choose another output.path")
        if _is_inside(source, output):
            raise OutputError(f"{shown_input} lies inside {shown_output}; choose another output.path")
        if _is_inside(output, source):
            below = output.removeprefix(source).strip("/").split("/")
            if not pattern or _reaches(pattern, below):
                raise OutputError(
                    f"{shown_output} lies inside {shown_input}: the next run would read this run's completions; "
                    "choose an output.path beside the input"
                )


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and inner.startswith(outer.rstrip("/") + "/")


def _reaches(pattern: str, below: Sequence[str]) -> bool:
    """Whether a glob may match a part of an output that lies ``below`` the glob's fixed prefix."""
    parts = pattern.split("/")
    if "**" in parts:
        return True
    # A part is two names below its output.
    if len(parts) != len(below) + 2:
        return False
    return all(fnmatchcase(name, part) for name, part in zip(below, parts, strict=False))
