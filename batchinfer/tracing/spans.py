"""What a span is to the rest of batchinfer, with or without OpenTelemetry.

A run's spans: ``job`` holds a ``replica`` for each replica's life; a replica holds its ``start`` and a ``unit`` for
each try of a unit; a unit holds ``read``, ``render``, ``generate`` and ``publish``. Jobs and replicas are told of by
the driver, so that a replica that is killed leaves no span without its parent; the rest by the replica itself.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

Attribute = str | int | float | bool


class Span(Protocol):
    """Something that takes time. As a context manager it ends with its block, and an exception is its error."""

    @property
    def trace_parent(self) -> str | None:
        """What its children in any process are begun with; None where nothing is traced."""

    def end(self, error: str = "") -> None:
        """It is over; with ``error`` set it failed. The first call counts."""

    def __enter__(self) -> "Span": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Spans(Protocol):
    """Where spans come from. For any thread."""

    def begin(self, name: str, parent: str | None, /, **attributes: Attribute) -> Span:
        """Begin a span; attributes hold counts, ids and names, never a row's text."""

    def flush(self) -> None:
        """Send what has ended if that can be done within a second: the process may be killed next."""

    def close(self) -> None:
        """Send what has ended, and end. Takes two seconds at most, whatever the collector does."""


class _NoSpan:
    trace_parent: str | None = None

    def end(self, error: str = "") -> None:
        pass

    def __enter__(self) -> "_NoSpan":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class NoSpans:
    """Traces are off."""

    def begin(self, name: str, parent: str | None, /, **attributes: Attribute) -> Span:
        return _NO_SPAN

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


_NO_SPAN = _NoSpan()


@dataclass(frozen=True, slots=True)
class TraceSetup:
    """What a replica needs to add its spans to the run's trace."""

    parent: str
    #: The driver's OTEL_* variables, for what a node does not set itself. May hold credentials.
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def under(cls, span: Span) -> "TraceSetup | None":
        """For a replica whose spans are children of this one; None where nothing is traced."""
        if span.trace_parent is None:
            return None
        return cls(span.trace_parent, {name: value for name, value in os.environ.items() if name.startswith("OTEL_")})

    def apply_environment(self) -> None:
        """Set the variables that this process lacks."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
