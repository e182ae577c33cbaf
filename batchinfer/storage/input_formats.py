"""The formats input shards come in, and how a file's name tells them."""

from typing import Final, Literal

InputFormat = Literal["parquet", "jsonl"]
#: A job file's ``input.format``.
ChosenFormat = Literal["auto", "parquet", "jsonl"]

_COMPRESSIONS: Final = ("", ".gz", ".zst")
SUFFIXES: "Final[dict[InputFormat, tuple[str, ...]]]" = {
    "parquet": (".parquet",),
    "jsonl": tuple(f"{suffix}{end}" for suffix in (".jsonl", ".ndjson") for end in _COMPRESSIONS),
}


def format_by_name(name: str) -> InputFormat | None:
    """What the end of a file's name says, or None when it says nothing."""
    return next((each for each, suffixes in SUFFIXES.items() if name.lower().endswith(suffixes)), None)


def format_of(name: str, chosen: ChosenFormat) -> InputFormat:
    """The format a shard is read as; one whose name says nothing is Parquet unless the job says otherwise."""
    return (format_by_name(name) or "parquet") if chosen == "auto" else chosen
