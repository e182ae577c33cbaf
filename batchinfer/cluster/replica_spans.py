"""The spans that the driver tells: the run's, and each replica's from its start to its end."""

from collections.abc import Iterator
from contextlib import contextmanager

from batchinfer.cluster.prepare import Preparation
from batchinfer.tracing import Span, Spans, TraceSetup, open_spans


class ReplicaSpans:
    """One open span for each replica that was started and is not gone. For one thread."""

    def __init__(self, spans: Spans, parent: str | None) -> None:
        self._spans = spans
        self._parent = parent
        self._open: dict[int, Span] = {}

    def begin(self, replica_id: int) -> TraceSetup | None:
        """A replica is asked for; what it needs to add to the trace."""
        span = self._open[replica_id] = self._spans.begin("replica", self._parent, replica=replica_id)
        return TraceSetup.under(span)

    def end(self, replica_id: int, error: str) -> None:
        """A replica is gone; ``error`` is empty if it was not needed any more."""
        if (span := self._open.pop(replica_id, None)) is not None:
            span.end(error)

    def close(self) -> None:
        """End those that are left: the run breaks off."""
        for replica_id in tuple(self._open):
            self.end(replica_id, "the run broke off")


@contextmanager
def traced(preparation: Preparation, run_id: str) -> Iterator[ReplicaSpans]:
    """The span of a run, which ends with the block; where the job wants no traces, nothing.

    Raises SpecError where traces are asked for and OpenTelemetry is not installed.
    """
    spec = preparation.spec
    spans = open_spans(traces=spec.telemetry.traces, run_id=run_id, role="driver")
    try:
        with spans.begin(
            "job",
            None,
            job_name=spec.name,
            run_id=run_id,
            output=str(preparation.output),
            num_units_pending=len(preparation.pending),
        ) as job:
            replicas = ReplicaSpans(spans, job.trace_parent)
            try:
                yield replicas
            finally:
                replicas.close()
    finally:
        spans.close()
