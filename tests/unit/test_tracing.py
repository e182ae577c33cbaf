"""Spans: nothing is imported while they are off, and a collector that does not answer holds nobody up."""

import os
import socket
import subprocess
import sys
import time

import pytest

from batchinfer.errors import SpecError
from batchinfer.tracing import NoSpans, TraceSetup, open_spans
from batchinfer.tracing import otel as otel_spans
from tests.collector import collector


def test_without_traces_nothing_of_opentelemetrys_exporter_is_imported() -> None:
    code = (
        "import sys\nfrom batchinfer.tracing import open_spans, TraceSetup\n"
        "import batchinfer.cluster.driver, batchinfer.cluster.replica\n"
        "spans = open_spans(traces=False)\nwith spans.begin('job', None) as job:\n"
        "    assert TraceSetup.under(job) is None\n"
        "spans.flush()\nspans.close()\n"
        "assert not any(name.startswith('opentelemetry.exporter.otlp') for name in sys.modules)\n"
        "assert 'batchinfer.tracing.otel' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_traces_without_opentelemetry_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "batchinfer.tracing.otel", None)
    with pytest.raises(SpecError, match=r"batchinfer\[otel\]"):
        open_spans(traces=True)


def test_a_span_ends_once_and_carries_its_error_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (endpoint, arrived):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        spans = open_spans(traces=True, role="driver")
        span = spans.begin("replica", None, replica=3)
        span.end("cannot read s3://user:secret@bucket/x")
        span.end()
        with pytest.raises(ValueError, match="no"), spans.begin("unit", span.trace_parent):
            raise ValueError("no")
        spans.close()
    replica, unit = sorted(arrived, key=lambda it: it.name)
    assert (replica.name, replica.is_error, replica.attributes) == ("replica", True, {"replica": 3})
    assert (unit.parent_id, unit.trace_id, unit.is_error) == (replica.span_id, replica.trace_id, True)
    assert replica.resource["role"] == "driver"


def test_the_services_name_may_be_set_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (endpoint, arrived):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "nightly")
        spans = open_spans(traces=True)
        spans.begin("job", None).end()
        spans.close()
    assert [span.resource["service.name"] for span in arrived] == ["nightly"]


def test_a_collector_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel_spans, "FLUSH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(otel_spans, "CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        spans = open_spans(traces=True)
        spans.begin("unit", None).end()
        began_s = time.monotonic()
        for _ in range(5):
            spans.flush()
        spans.close()
        assert time.monotonic() - began_s < 1.0


def test_a_replica_takes_the_drivers_variables_where_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (endpoint, _):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret")
        monkeypatch.setenv("UNRELATED", "1")
        spans = open_spans(traces=True)
        with spans.begin("replica", None) as span:
            setup = TraceSetup.under(span)
        spans.close()
    assert setup is not None
    assert set(setup.environment) == {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"}
    assert "secret" not in repr(setup)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://of-the-node:4318")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_HEADERS")
    setup.apply_environment()
    assert os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://of-the-node:4318"
    assert os.environ["OTEL_EXPORTER_OTLP_HEADERS"] == "api-key=secret"
    assert TraceSetup.under(NoSpans().begin("x", None)) is None
