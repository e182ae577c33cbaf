"""Traces of a run, off by default: what its spans are, and their export by OpenTelemetry."""

from batchinfer.tracing.opening import open_spans
from batchinfer.tracing.spans import NoSpans, Span, Spans, TraceSetup

__all__ = ["NoSpans", "Span", "Spans", "TraceSetup", "open_spans"]
