"""The spans of a replica's units: each try of a unit with its stages."""

from collections.abc import Iterator
from contextlib import contextmanager

from batchinfer.cluster.messages import Assignment
from batchinfer.tracing import NoSpans, Span, Spans


class UnitSpans:
    """The units in hand. For any thread."""

    def __init__(self, spans: Spans, parent: str | None) -> None:
        self._spans = spans
        self._parent = parent
        #: By unit and lease.
        self._open: dict[tuple[str, int], Span] = {}

    @contextmanager
    def unit(self, assignment: Assignment) -> Iterator[None]:
        """One try of a unit. Its spans are sent before its answer is, for that may be the process's last."""
        unit, key = assignment.unit, _key(assignment)
        try:
            with self._spans.begin(
                "unit",
                self._parent,
                unit=unit.unit_id,
                num_rows=len(assignment.offsets) or unit.num_rows,
                attempt=assignment.attempt,
                is_probe=bool(assignment.offsets),
            ) as span:
                self._open[key] = span
                yield
        finally:
            self._open.pop(key, None)
            self._spans.flush()

    @contextmanager
    def stage(self, assignment: Assignment, name: str) -> Iterator[None]:
        """One stage of a unit in hand."""
        span = self._open.get(_key(assignment))
        with self._spans.begin(name, span.trace_parent if span is not None else self._parent):
            yield


NO_UNIT_SPANS = UnitSpans(NoSpans(), None)


def _key(assignment: Assignment) -> tuple[str, int]:
    return assignment.unit.unit_id, assignment.lease
