"""From work and a speed to hours and money."""

import pytest

from batchinfer.speeds import Speed
from batchinfer.survey.estimate import Estimate, Workload, fitting_speeds, replica_seconds

RUN = Speed(
    model="m",
    device="H100",
    engine="continuous",
    dtype="bfloat16",
    source="run",
    at="2026-01-01",
    job="j",
    replica_s=100.0,
    num_prompt_tokens=10_000,
    num_completion_tokens=5_000,
    num_completions=50,
    mean_completion_tokens=100.0,
)
PROBE = Speed(
    model="m",
    device="H100",
    engine="continuous",
    dtype="bfloat16",
    source="probe",
    at="2026-01-01",
    job="k",
    replica_s=10.0,
    num_prompt_tokens=1_000,
    num_completion_tokens=500,
    num_completions=5,
    mean_completion_tokens=None,
    prefill_tokens_per_s=1000.0,
    decode_tokens_per_s=100.0,
)
SAME_MIXTURE = Workload(100_000, 50_000, 1000, "max_new_tokens")


def test_a_run_of_the_same_job_tells_by_its_completions() -> None:
    assert replica_seconds(Workload(1, 1, 100, "a run of this job"), RUN, "j") == (200.0, 200.0)


def test_a_probe_knows_reading_and_generating_apart() -> None:
    assert replica_seconds(SAME_MIXTURE, PROBE, "other") == (600.0, 600.0)


def test_another_job_of_the_same_mixture_scales_whatever_a_prompt_token_costs() -> None:
    least, most = replica_seconds(SAME_MIXTURE, RUN, "other")
    assert (least, most) == pytest.approx((1000.0, 1000.0))


def test_another_mixture_is_a_range_that_a_probe_closes() -> None:
    only_reading = Workload(100_000, 1_000, 1000, "probe")
    least, most = replica_seconds(only_reading, RUN, "other")
    assert least < most
    exact = replica_seconds(only_reading, RUN, "other", PROBE)
    # A prompt token costs a tenth: 11,000 of 6,000 units that took 100 s.
    assert exact == pytest.approx((100 * 11_000 / 6_000,) * 2)
    assert least < exact[0] < most


def test_hours_and_money_are_those_of_all_replicas() -> None:
    estimate = Estimate(SAME_MIXTURE, RUN, (3600.0, 7200.0), 4, 2.0, 3.0)
    assert estimate.elapsed_s == (900.0, 1800.0)
    assert estimate.gpu_hours == (2.0, 4.0)
    assert estimate.cost == (6.0, 12.0)
    assert estimate.as_json()["is_upper_bound"] is True
    unknown = Estimate(SAME_MIXTURE, RUN, (3600.0, 7200.0), None, 1.0)
    assert (unknown.elapsed_s, unknown.cost) == ((3600.0, 7200.0), None)


def test_only_speeds_of_this_model_and_device_fit_newest_first() -> None:
    speeds = (RUN, PROBE)
    fits = {"model": "m", "dtype": "bfloat16", "engine": "auto", "devices": {"H100"}}

    def fitting(**changed: object) -> tuple[Speed, ...]:
        return fitting_speeds(speeds, **{**fits, **changed})  # type: ignore[arg-type]

    assert fitting() == (PROBE, RUN)
    assert fitting(devices=None, engine="continuous") == (PROBE, RUN)
    for changed in ({"model": "n"}, {"dtype": "float32"}, {"engine": "padded"}, {"devices": {"A100"}}):
        assert fitting(**changed) == ()
