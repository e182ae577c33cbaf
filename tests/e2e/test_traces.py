"""A run's spans as a collector receives them, from the driver's process and from the replicas'."""

from collections import Counter
from pathlib import Path

import pytest

from batchinfer.cluster.driver import run
from tests.collector import CollectedSpan, collector
from tests.jobs import fake_job, model_without_weights, prompts, write_input

STAGES = {"read", "render", "generate", "publish"}


@pytest.mark.usefixtures("ray_session")
def test_spans_have_the_right_parents_across_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 two replicas generate and commit; 2 their last spans arrive although they are killed at the end."""
    with collector() as (endpoint, spans):
        # Ray was started before: the replicas have it from the driver.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        spec = fake_job(
            model_without_weights(tmp_path / "model"),
            write_input(tmp_path / "in", [40, 24]),
            tmp_path / "out",
            cluster={"replicas": 2},
            telemetry={"traces": True},
        )
        result = run(spec)
    by_id = {span.span_id: span for span in spans}
    assert len({span.trace_id for span in spans}) == 1

    def parent(span: CollectedSpan) -> CollectedSpan:
        return by_id[span.parent_id]

    (job,) = [span for span in spans if span.name == "job"]
    assert not job.parent_id
    assert job.attributes["run_id"] == result.run_id
    replicas = [span for span in spans if span.name == "replica"]
    assert {span.attributes["replica"] for span in replicas} == {0, 1}
    assert all(parent(span) is job for span in replicas)
    for start in (span for span in spans if span.name == "start"):
        assert parent(start) in replicas
    units = [span for span in spans if span.name == "unit"]
    assert len({span.attributes["unit"] for span in units}) == len(units) == result.num_units
    for unit in units:
        assert parent(unit) in replicas
        assert unit.resource["role"] == f"replica-{parent(unit).attributes['replica']}"
        assert parent(unit).resource["role"] == "driver"
        stages = [span for span in spans if span.parent_id == unit.span_id]
        assert {span.name for span in stages} == STAGES
        assert len(stages) == len(STAGES)
        assert all(unit.start_ns <= span.start_ns <= span.end_ns <= unit.end_ns for span in stages)
    assert set(Counter(span.name for span in spans)) == {"job", "replica", "start", "unit", *STAGES}
    assert not any(span.is_error for span in spans)
    assert all(span.resource["service.name"] == "batchinfer" for span in spans)
    told = [str(value) for span in spans for value in span.attributes.values()]
    assert not any(prompt in text for prompt in prompts(64) for text in told)
