"""A collector of OpenTelemetry spans on loopback: ``with collector() as spans``, and runs export to it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.loopback import QuietRequests, serving


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """A span as it arrived."""

    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, object]
    resource: dict[str, object]


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[CollectedSpan]]]:
    """(endpoint, the spans that have arrived so far)."""
    spans: list[CollectedSpan] = []

    class Collect(QuietRequests):
        def do_POST(self) -> None:  # noqa: N802 (http.server's name)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                spans.extend(_spans(ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

    with serving(Collect) as url:
        yield url, spans


def _spans(request: ExportTraceServiceRequest) -> Iterator[CollectedSpan]:
    for of_resource in request.resource_spans:
        resource = {it.key: _value(it.value) for it in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield CollectedSpan(
                    span.name,
                    span.trace_id,
                    span.span_id,
                    span.parent_span_id,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    {it.key: _value(it.value) for it in span.attributes},
                    resource,
                )


def _value(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(value, kind) if kind is not None else None
