"""Fixtures for every layer: one Ray for the session, tiny models, a clean environment."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidia0").exists():
    # Triton decides at its import, which transformers' models bring about, whether kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings

from tests.tiny import tiny_exaone3

# The default suite tries the same examples on every machine, so that it tells whether a change is right; `make long`
# and HYPOTHESIS_PROFILE=search look for new ones. An example it finds becomes an @example of its test.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Before Ray is imported anywhere: no reports over the network, no rewriting of CUDA_VISIBLE_DEVICES.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither models that tests put behind a URI nor the speeds of their runs belong in the user's cache.

    Replicas and commands that tests start inherit it.
    """
    os.environ["BATCHINFER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray inside the test process, started once; runs in the same process use it and leave it alone."""
    import ray

    # Metrics are exported once a second; ten seconds apart, a test would only wait.
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def exaone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random EXAONE 3.0 checkpoint in hub layout, with a tokenizer and the EXAONE 3.x chat template."""
    directory = tmp_path_factory.mktemp("exaone")
    tiny_exaone3(directory)
    return directory
