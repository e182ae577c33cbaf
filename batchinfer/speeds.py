"""How fast models were on devices: a small file in the user's cache, written after runs and probes, read by ``plan``.

It is a convenience: a file that is damaged, locked away or gone is an empty one, and no run fails for it.
"""

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from batchinfer.models.locate import cache_directory

logger = logging.getLogger(__name__)

Source = Literal["run", "probe"]

#: Speeds kept in all, and of one model on one kind of device; the oldest go first.
MAX_KEPT = 200
MAX_KEPT_ALIKE = 4
_FORMAT = 1
_MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Speed:
    """What one run, or one probe, came to; times are of replicas at work, waiting and loading left out."""

    #: :func:`model_key` of the model.
    model: str
    #: The device's own name, such as ``NVIDIA H100 80GB HBM3``.
    device: str
    engine: str
    dtype: str
    source: Source
    #: When, ISO 8601.
    at: str
    #: Fingerprint of the job.
    job: str
    #: Summed over replicas.
    replica_s: float
    num_prompt_tokens: int
    #: Generated, not those that came from journals or from an equal request.
    num_completion_tokens: int
    #: Of all completions: what the job's own lengths are.
    num_completions: int
    #: None where not all of them were seen to end.
    mean_completion_tokens: float | None
    #: Apart, where they were measured apart; None = only the mixture above is known.
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


def model_key(identity: Mapping[str, str]) -> str:
    """Short name of a model by what identifies it, wherever it lies."""
    return sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]


def speeds_file() -> Path:
    """Where they are kept."""
    return cache_directory() / "speeds.json"


def read_speeds(path: Path) -> tuple[Speed, ...]:
    """What is known, oldest first; entries that make no sense are left out."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return ()
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ()
    entries = content.get("speeds") if isinstance(content, dict) and content.get("format") == _FORMAT else None
    if not isinstance(entries, list):
        return ()
    return tuple(speed for entry in entries if (speed := _speed(entry)) is not None)


def remember_speed(speed: Speed, path: Path) -> None:
    """Add one; may wait for another process that does the same. What cannot be written is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = kept_speeds((*read_speeds(path), speed))
            content = json.dumps({"format": _FORMAT, "speeds": [asdict(each) for each in kept]}, indent=1)
            _replace(path, content.encode())
    except OSError as error:
        logger.info("the speed of this run is not remembered: %s cannot be written (%s)", path, error.strerror)


def kept_speeds(speeds: Sequence[Speed]) -> tuple[Speed, ...]:
    """The newest of them, within both limits; oldest first, as they came."""
    kept: list[Speed] = []
    num_alike: dict[tuple[str, ...], int] = {}
    for speed in reversed(speeds):
        kind = (speed.model, speed.device, speed.engine, speed.dtype, speed.source)
        num_alike[kind] = num_alike.get(kind, 0) + 1
        if num_alike[kind] <= MAX_KEPT_ALIKE and len(kept) < MAX_KEPT:
            kept.append(speed)
    return tuple(reversed(kept))


def _replace(path: Path, content: bytes) -> None:
    """In one step: a crash leaves the old file, and at most a temporary one beside it."""
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _speed(entry: object) -> Speed | None:
    """None for what another version, or an accident, has written."""
    try:
        speed = Speed(**entry) if isinstance(entry, dict) else None
    except TypeError:
        return None
    return speed if speed is not None and _makes_sense(speed) else None


def _makes_sense(speed: Speed) -> bool:
    texts = (speed.model, speed.device, speed.engine, speed.dtype, speed.at, speed.job)
    counts = (speed.num_prompt_tokens, speed.num_completion_tokens, speed.num_completions)
    rates = (speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.mean_completion_tokens)
    return (
        speed.source in get_args(Source)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and _is_positive(speed.replica_s)
        and all(rate is None or _is_positive(rate) for rate in rates)
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")
