"""Spans through OpenTelemetry, sent by OTLP over HTTP as the standard OTEL_* variables say.

A collector that is slow or away costs spans, never work: sending is done by threads of its own, and whoever waits
for it waits a second or two at most.
"""

import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from batchinfer.redact import redact
from batchinfer.tracing.spans import Attribute, Span

FLUSH_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 2.0

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACE_PARENT = "traceparent"


class OtelSpan:
    """One span of OpenTelemetry's."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def trace_parent(self) -> str | None:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span))
        return carrier.get(_TRACE_PARENT)

    def end(self, error: str = "") -> None:
        if self._span.is_recording():
            if error:
                self._span.set_status(trace.StatusCode.ERROR, redact(error))
            self._span.end()

    def __enter__(self) -> "OtelSpan":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end("" if error is None else f"{type(error).__name__}: {error}")


class OtelSpans:
    """Spans of one process; ``attributes`` become its resource's."""

    def __init__(self, attributes: Mapping[str, Attribute]) -> None:
        self._provider = TracerProvider(resource=_resource(attributes), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("batchinfer")
        self._sending = threading.Lock()

    def begin(self, name: str, parent: str | None, /, **attributes: Attribute) -> Span:
        context = Context() if parent is None else _PROPAGATOR.extract({_TRACE_PARENT: parent}, Context())
        return OtelSpan(self._tracer.start_span(name, context=context, attributes=attributes))

    def flush(self) -> None:
        # While the one before is still being sent nothing is to be gained by waiting for another.
        if self._sending.acquire(blocking=False):
            _wait_for(self._flush, FLUSH_TIMEOUT_S)

    def close(self) -> None:
        _wait_for(self._provider.shutdown, CLOSE_TIMEOUT_S)

    def _flush(self) -> None:
        try:
            self._provider.force_flush()
        finally:
            self._sending.release()


def _resource(attributes: Mapping[str, Attribute]) -> Resource:
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create({**attributes} if named else {"service.name": "batchinfer", **attributes})


def _wait_for(call: Callable[[], object], timeout_s: float) -> None:
    """Call it on a thread that may go on alone after ``timeout_s``, and ends with the process."""
    thread = threading.Thread(target=call, name="traces", daemon=True)
    thread.start()
    thread.join(timeout_s)
