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


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray inside the test process, started once; runs in the same process use it and leave it alone."""
    import ray

    # Replicas inherit it: models that tests put behind a URI must not end up in the user's cache.
    os.environ.setdefault("BATCHINFER_CACHE", str(tmp_path_factory.mktemp("cache")))
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def exaone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random EXAONE 3.0 checkpoint in hub layout, with a tokenizer and the EXAONE 3.x chat template."""
    directory = tmp_path_factory.mktemp("exaone")
    tiny_exaone3(directory)
    return directory
