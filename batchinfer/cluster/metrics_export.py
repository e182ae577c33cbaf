"""Hands a run's metrics to Ray, whose agent on the driver's node exports them for Prometheus."""

import logging

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from batchinfer.cluster.prepare import Preparation
from batchinfer.run_metrics import METRICS, UNIT_SECONDS, Metric, RunMetrics
from batchinfer.telemetry import RunProgress

logger = logging.getLogger(__name__)


def exported(preparation: Preparation, run_id: str) -> "MetricsExport":
    """The view that exports a run's metrics; Ray is connected. Says where they are unless a cluster was joined."""
    spec = preparation.spec
    if spec.cluster.address is None and (url := metrics_url()) is not None:
        logger.info("metrics for Prometheus: %s", url)
    return MetricsExport(RunMetrics(spec.name, run_id, preparation.num_rows_committed))


class MetricsExport:
    """A view of a run's progress. Recording costs microseconds: Ray sends every ten seconds, from threads of its own.

    Behind ray:// nothing is exported, since this process then runs beside no agent.
    """

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
        self._instruments = {metric.name: _instrument(metric) for metric in METRICS}

    def show(self, progress: RunProgress) -> None:
        for sample in self._metrics.samples(progress):
            instrument, tags = self._instruments[sample.metric.name], _in_ascii(sample.tags)
            match instrument:
                case Counter():
                    instrument.inc(sample.value, tags=tags)
                case Gauge():
                    instrument.set(sample.value, tags=tags)
                case Histogram():
                    instrument.observe(sample.value, tags=tags)

    def close(self) -> None:
        pass


def _instrument(metric: Metric) -> Counter | Gauge | Histogram:
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.description, metric.tags)
        case "gauge":
            return Gauge(metric.name, metric.description, metric.tags)
        case "histogram":
            return Histogram(metric.name, metric.description, list(UNIT_SECONDS), metric.tags)


def _in_ascii(tags: dict[str, str]) -> dict[str, str]:
    """Ray refuses any other character, which a job's name may well have; they are spelt out as ``\\uc57c``."""
    if all(value.isascii() for value in tags.values()):
        return tags
    return {name: value.encode("ascii", "backslashreplace").decode("ascii") for name, value in tags.items()}


def metrics_url() -> str | None:
    """Where this node answers Prometheus, with the metrics of this process among the rest; None where it does not."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, object]] = ray.nodes()  # type: ignore[no-untyped-call]
    for node in nodes:
        if node["NodeID"] == here and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None
