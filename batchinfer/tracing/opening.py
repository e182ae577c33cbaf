"""Where a process gets its spans from; nothing of OpenTelemetry is imported until traces are asked for."""

from batchinfer.errors import SpecError
from batchinfer.tracing.spans import Attribute, NoSpans, Spans


def open_spans(*, traces: bool, **attributes: Attribute) -> Spans:
    """Spans that go to the collector the OTEL_* variables name, or nowhere; ``attributes`` say what this process is.

    Raises SpecError where traces are asked for and OpenTelemetry is not installed.
    """
    if not traces:
        return NoSpans()
    try:
        from batchinfer.tracing.otel import OtelSpans
    except ImportError as error:
        raise SpecError(
            f"telemetry.traces: {error.name or error} is not installed here; install it on the driver and on every "
            "node (pip install 'batchinfer[otel]'), or set telemetry.traces: false"
        ) from error
    return OtelSpans(attributes)
