"""What a run tells while it goes on: the numbers behind progress, and how fast they move.

Standard library only; how they are drawn is in ``progress``.
"""

import io
import logging
import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RATE_WINDOW_S = 30.0


#: Names of files may hold line ends and terminal commands; in a log they are only shown.
_SHOWN = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}


def shown(text: str) -> str:
    """The text with control characters spelt out, for a log or a terminal."""
    return text.translate(_SHOWN)


class _OneLine(logging.Formatter):
    """A message cannot write a second line of the log, nor anything to the terminal but text."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.message = shown(record.message)
        return super().formatMessage(record)


def configure_logging() -> None:
    """Log lines of batchinfer to stderr, warnings of everything else; called by commands, never by the library."""
    formatter = _OneLine("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[stream], force=True)
    logging.getLogger("batchinfer").setLevel(logging.INFO)


class LogStream(io.TextIOBase):
    """A text stream whose lines become debug messages of a logger."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._logger.debug("%s", line)
        return len(text)


@dataclass(frozen=True, slots=True)
class EngineUse:
    """How busy the ready replicas' engines are, all together; shares are None before there is anything to share."""

    #: Sequences in the batches now, of the most that fit.
    num_active: int = 0
    capacity: int = 0
    #: Of the KV caches' places, now.
    kv_use: float | None = None
    #: Of the last half minute, the time in which an engine had nothing to do.
    idle_share: float | None = None
    #: Of all tokens computed since the replicas' start, those that were padding.
    padding_share: float | None = None
    num_preemptions: int = 0
    num_prefix_hits: int = 0


ReplicaState = Literal["starting", "running", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class ReplicaLook:
    """One replica as it was last heard of. Shares and rates are None before there is anything to take them from."""

    replica_id: int
    #: ``starting`` waits for its device or loads the model; ``dead`` ones are told of for a while.
    state: ReplicaState
    node: str = ""
    device: str = ""
    num_units: int = 0
    prompt_tokens_per_s: float | None = None
    completion_tokens_per_s: float | None = None
    #: Sequences in its batch now / the most that fit.
    batch_fill: float | None = None
    kv_use: float | None = None
    #: Of the last half minute.
    idle_share: float | None = None
    # Totals since its start.
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_preemptions: int = 0
    idle_s: float = 0.0
    num_storage_retries: int = 0
    num_journal_flushes: int = 0
    journal_s: float = 0.0
    #: Why it died.
    error: str = ""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """One look at a run. Row and unit counts include what earlier runs committed; tokens are this run's."""

    elapsed_s: float = 0.0
    num_rows: int = 0
    num_rows_committed: int = 0
    #: Rows of units in flight whose generation has ended but whose unit has not.
    num_rows_finished: int = 0
    num_units: int = 0
    num_units_committed: int = 0
    num_units_given_up: int = 0
    #: Units that wait for a replica, and units that one holds.
    num_units_pending: int = 0
    num_units_in_flight: int = 0
    num_dead_letters: int = 0
    #: Sequences of this run's commits that took the tokens of an identical one.
    num_shared_sequences: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_replicas_ready: int = 0
    num_replicas_starting: int = 0
    prompt_tokens_per_s: float = 0.0
    completion_tokens_per_s: float = 0.0
    num_replicas_died: int = 0
    eta_s: float | None = None
    #: Where the time left lies 19 times of 20; its end is infinite where even a standstill would be no surprise.
    eta_range_s: tuple[float, float] | None = None
    #: Of this run's commits.
    dead_letters_by_type: dict[str, int] = field(default_factory=dict)
    #: Completions of this run's commits, and how many of them are amiss, by kind.
    num_completions: int = 0
    quality: dict[str, int] = field(default_factory=dict)
    engines: EngineUse = EngineUse()
    replicas: tuple[ReplicaLook, ...] = ()
    #: The last words of replicas that are gone since the look before, for whoever keeps count.
    replicas_gone: tuple[ReplicaLook, ...] = ()
    #: Seconds from lease to commit of each unit committed since the look before.
    unit_seconds: tuple[float, ...] = ()


@dataclass(slots=True)
class RateMeter:
    """Rates over the last :data:`RATE_WINDOW_S` seconds of (time, rows, prompt tokens, completion tokens) readings."""

    _readings: deque[tuple[float, float, int, int]] = field(default_factory=deque)

    def add(self, at_s: float, num_rows: float, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        self._readings.append((at_s, num_rows, num_prompt_tokens, num_completion_tokens))
        while len(self._readings) > 2 and at_s - self._readings[0][0] > RATE_WINDOW_S:
            self._readings.popleft()

    def per_second(self) -> tuple[float, float, float]:
        """(rows, prompt tokens, completion tokens) per second; zeros before the second reading."""
        if len(self._readings) < 2:
            return (0.0, 0.0, 0.0)
        first, last = self._readings[0], self._readings[-1]
        span_s = max(last[0] - first[0], 1e-9)
        rates = [max(0.0, (last[k] - first[k]) / span_s) for k in (1, 2, 3)]
        return (rates[0], rates[1], rates[2])


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``; the two largest parts only."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest_s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"


def time_left(eta_s: float, range_s: tuple[float, float] | None) -> str:
    """``12m00s (10m00s to 15m05s)``; the range only where it says something."""
    if range_s is None:
        return duration(eta_s)
    low, high = duration(range_s[0]), duration(range_s[1]) if range_s[1] < math.inf else ""
    if low == high:
        return duration(eta_s)
    return f"{duration(eta_s)} ({low} to {high})" if high else f"{duration(eta_s)} ({low} or more)"


def progress_line(progress: RunProgress) -> str:
    """One plain line for logs and pipes."""
    eta = f", ETA {time_left(progress.eta_s, progress.eta_range_s)}" if progress.eta_s is not None else ""
    dead = f", {progress.num_dead_letters} dead letters" if progress.num_dead_letters else ""
    shared = f", {progress.num_shared_sequences:,} shared" if progress.num_shared_sequences else ""
    starting = f" ({progress.num_replicas_starting} starting)" if progress.num_replicas_starting else ""
    return (
        f"{progress.num_rows_committed + progress.num_rows_finished:,} of {progress.num_rows:,} rows, "
        f"{progress.num_units_committed:,} of {progress.num_units:,} units committed, "
        f"{progress.prompt_tokens_per_s:,.0f} tok/s in, {progress.completion_tokens_per_s:,.0f} tok/s out, "
        f"{progress.num_replicas_ready} replicas{starting}{engine_use(progress.engines)}{shared}{dead}"
        f"{amiss(progress.quality, progress.num_completions)}{eta}"
    )


def amiss(quality: Mapping[str, int], num_completions: int) -> str:
    """``, 12% truncated, 1% repeating`` of the completions so far; empty where nothing is amiss."""
    return "".join(
        f", {number / num_completions:.1%} {kind.replace('_', ' ')}"
        for kind, number in sorted(quality.items(), key=lambda it: (-it[1], it[0]))
        if number and num_completions
    )


def engine_use(use: EngineUse) -> str:
    """``, batch 96%, KV 63%, idle 2%``; empty without a replica, each piece only where it says something."""
    if not use.capacity:
        return ""
    pieces = [f"batch {use.num_active / use.capacity:.0%}"]
    if use.kv_use is not None:
        pieces.append(f"KV {use.kv_use:.0%}")
    if use.padding_share:
        pieces.append(f"padding {use.padding_share:.0%}")
    if use.idle_share is not None:
        pieces.append(f"idle {use.idle_share:.0%}")
    if use.num_preemptions:
        pieces.append(f"{use.num_preemptions:,} preemptions")
    return "".join(f", {piece}" for piece in pieces)
