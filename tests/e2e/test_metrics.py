"""A run's metrics as Prometheus reads them: from the port on which Ray exports them."""

import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from batchinfer.cluster.driver import run
from batchinfer.cluster.metrics_export import metrics_url
from batchinfer.progress import SilentProgress
from batchinfer.run_metrics import METRICS
from tests.jobs import fake_job, model_without_weights, write_input

#: Ray sends once a second here (conftest), ten seconds apart elsewhere.
WITHIN_S = 20.0
JOB_NAME = 'night "7", 한국어'
#: Ray's tags are ASCII.
EXPORTED_NAME = r'night "7", \ud55c\uad6d\uc5b4'


def scraped(job_name: str) -> dict[str, list[Sample]]:
    """The samples of a job by their metric's name, ``ray_`` left out."""
    url = metrics_url()
    assert url is not None
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("job_name") == job_name:
                found.setdefault(sample.name.removeprefix("ray_"), []).append(sample)
    return found


def total(samples: list[Sample]) -> float:
    return sum(sample.value for sample in samples)


@pytest.mark.usefixtures("ray_session")
def test_a_run_exports_what_it_did(tmp_path: Path) -> None:
    """1 a run with dead letters, slow enough to be seen at work; 2 its gauges meanwhile; 3 its counters at the end."""
    source = write_input(tmp_path / "in", [32])
    spec = fake_job(
        model_without_weights(tmp_path / "model", limit=60),
        source,
        tmp_path / "out",
        engine={"fake": {"tokens_per_s": 25}},
        execution={"rows_per_unit": 8, "journal_interval_s": 0.5},
    ).model_copy(update={"name": JOB_NAME})
    seen: dict[str, list[Sample]] = {}

    class Watching(SilentProgress):
        def show(self, progress: object) -> None:
            seen.update(scraped(EXPORTED_NAME))

    result = run(spec, Watching())
    assert result.num_dead_letters > 0
    assert {sample.labels["replica"] for sample in seen["batchinfer_batch_fill_ratio"]} == {"0"}
    assert total(seen["batchinfer_units"]) == result.num_units
    until_s = time.monotonic() + WITHIN_S
    while True:
        found = scraped(EXPORTED_NAME)
        if total(found.get("batchinfer_rows_committed_total", [])) == result.num_rows:
            break
        assert time.monotonic() < until_s, found.keys()
        time.sleep(0.3)
    by_type = {sample.labels["error_type"]: sample.value for sample in found["batchinfer_dead_letters_total"]}
    assert by_type == result.dead_letters_by_type
    # As the replica last told, a second before its end at most.
    assert 0 < total(found["batchinfer_completion_tokens_total"]) <= result.num_completion_tokens
    assert 0 < total(found["batchinfer_prompt_tokens_total"]) <= result.num_prompt_tokens
    assert total(found["batchinfer_unit_seconds_count"]) == result.num_units
    assert total(found["batchinfer_journal_flushes_total"]) > 0
    names = {metric.name for metric in METRICS}
    assert {
        name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in {*seen, *found}
    } <= names
    # What is over is no gauge any more.
    while "batchinfer_batch_fill_ratio" in scraped(EXPORTED_NAME):
        assert time.monotonic() < until_s
        time.sleep(0.3)


@pytest.mark.usefixtures("ray_session")
def test_a_job_may_keep_its_metrics_to_itself(tmp_path: Path) -> None:
    spec = fake_job(model_without_weights(tmp_path / "model"), write_input(tmp_path / "in", [8]), tmp_path / "out")
    spec = spec.model_copy(update={"name": "quiet", "telemetry": spec.telemetry.model_copy(update={"metrics": False})})
    assert run(spec).num_rows_committed == 8
    time.sleep(1.5)
    assert scraped("quiet") == {}
