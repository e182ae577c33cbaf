"""Whether a model fits, by the engine's own arithmetic."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from batchinfer.devices import Gpu
from batchinfer.engine import kv_cache
from batchinfer.engine.build import continuous_limits
from batchinfer.engine.decoder_config import decoder_config
from batchinfer.errors import ModelError
from batchinfer.models.loading import load_model, read_facts
from batchinfer.spec import EngineSpec
from batchinfer.survey.memory import COMMON_GIB, Device, devices_of, fit_memory, stored_weights_bytes
from tests.tiny import tiny_exaone3, tiny_exaone_moe

CPU = torch.device("cpu")
GPU_A, GPU_B = Gpu("A", 10 << 30, 9 << 30), Gpu("B", 20 << 30, 19 << 30)


@pytest.fixture(scope="module")
def exaone3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exaone3")
    tiny_exaone3(directory)
    return directory


def test_the_fit_is_what_the_engine_itself_would_take(exaone3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(exaone3)
    config = decoder_config(facts.config)
    weights_bytes = sum(
        weight.numel() * 4 for weight in load_model(exaone3, dtype="float32", device="cpu").model.parameters()
    )
    free = weights_bytes + (64 << 20)
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: free - weights_bytes)
    limits = continuous_limits(config, torch.float32, CPU, facts.max_model_len)
    fit = fit_memory(exaone3, "float32", EngineSpec(), facts.max_model_len, [Device("here", "cpu", free, 1)])
    assert (fit.engine, fit.weights_bytes) == ("continuous", weights_bytes)
    assert fit.kv_bytes_per_token == kv_cache.bytes_per_place(config, torch.float32)
    (device,) = fit.fits
    assert device.fits
    assert (device.num_tokens, device.max_rows) == (limits.num_places, limits.max_rows)
    assert device.num_sequences(1.0) == limits.max_rows
    assert device.num_sequences(limits.num_places / 3) == 3


def test_a_device_that_is_too_small_does_not_fit(exaone3: Path) -> None:
    devices = [Device("tiny", "cpu", 1 << 10, 1), Device("gpu", "cuda", 2 << 30)]
    fits = fit_memory(exaone3, "float32", EngineSpec(), 512, devices).fits
    assert [fit.fits for fit in fits] == [False, True]
    assert fits[0].num_tokens == fits[0].num_sequences(10) == 0
    limited = fit_memory(exaone3, "float32", EngineSpec(max_batch_rows=3, max_batch_tokens=600), 512, devices).fits[1]
    assert (limited.max_rows, limited.num_tokens) == (3, 600)


def test_without_weights_on_this_machine_their_size_follows_from_the_configuration(
    exaone3: Path, tmp_path: Path
) -> None:
    shutil.copy(exaone3 / "config.json", tmp_path)
    assert stored_weights_bytes(tmp_path, 2) is None
    bare = fit_memory(tmp_path, "bfloat16", EngineSpec(), 512, [Device("gpu", "cuda", 4 << 30)])
    whole = fit_memory(exaone3, "bfloat16", EngineSpec(), 512, [Device("gpu", "cuda", 4 << 30)])
    assert bare == whole


def test_a_model_of_the_padded_engine_is_reckoned_as_that_engine_does(tmp_path: Path) -> None:
    tiny_exaone_moe(tmp_path)
    fit = fit_memory(tmp_path, "float32", EngineSpec(), 512, [Device("gpu", "cuda", 1 << 30)])
    assert fit.engine == "padded"
    assert fit.weights_bytes == stored_weights_bytes(tmp_path, 4)
    assert fit.fits[0].num_tokens == int(((1 << 30) - (fit.weights_bytes or 0)) * 0.75) // fit.kv_bytes_per_token
    with pytest.raises(ModelError, match=r"engine\.kind=padded"):
        fit_memory(tmp_path, "float32", EngineSpec(kind="continuous"), 512, [])
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert fit_memory(tmp_path, "float32", EngineSpec(), 512, [Device("gpu", "cuda", 1 << 30)]).fits == ()


def test_a_family_that_nobody_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ModelError, match="no-such-family"):
        fit_memory(tmp_path, "float32", EngineSpec(), 512, [])


def test_the_devices_told_of_are_those_asked_for_or_those_there() -> None:
    assert [device.name for device in devices_of((GPU_A,), 48, on_cpu=False)] == ["48 GiB GPU"]
    found = devices_of((GPU_A, GPU_A, GPU_B), None, on_cpu=False)
    assert [(device.name, device.count, device.free_bytes) for device in found] == [
        ("A", 2, 9 << 30),
        ("B", 1, 19 << 30),
    ]
    assert [device.kind for device in devices_of((GPU_A,), None, on_cpu=True)] == ["cpu"]
    assert len(devices_of((), None, on_cpu=False)) == 1 + len(COMMON_GIB)
