"""The arena and its size."""

from pathlib import Path

import pytest
import torch

from batchinfer.engine import kv_cache
from batchinfer.errors import ModelError
from tests.tiny import tiny_exaone3
from tests.unit.engine.decoder_worlds import CPU, facts


def test_an_arena_has_a_place_per_token_layer_and_head(tmp_path: Path) -> None:
    kv = kv_cache.allocate(facts(tiny_exaone3(tmp_path)), 100, torch.bfloat16, CPU)
    assert kv.keys_LNKD.shape == kv.values_LNKD.shape == (2, 100, 2, 8)
    assert kv.num_places == 100
    assert kv.keys_LNKD.dtype == torch.bfloat16
    assert not kv.keys_LNKD.any()
    assert kv.keys_LNKD.is_contiguous()


def test_the_arena_is_sized_by_what_is_free_after_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = facts(tiny_exaone3(tmp_path))
    assert kv_cache.bytes_per_place(config, torch.float32) == 2 * 2 * 2 * 8 * 4
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: 1_000_000)
    # 0.4 of a megabyte, less the reserve, at 256 bytes a place.
    assert kv_cache.num_places(config, torch.float32, CPU, reserved_bytes=16_000, min_places=512) == 1500
    with pytest.raises(ModelError, match=r"one sequence of 1,600 tokens take 0.00 GB .* lower model.max_model_len"):
        kv_cache.num_places(config, torch.float32, CPU, reserved_bytes=16_000, min_places=1600)
    with pytest.raises(ModelError, match=r"only 0\.00 GB are to be had"):
        kv_cache.num_places(config, torch.float32, CPU, reserved_bytes=10**9, min_places=1)


def test_activations_grow_with_tokens_and_with_logits(tmp_path: Path) -> None:
    config = facts(tiny_exaone3(tmp_path))
    base = kv_cache.activation_bytes(config, torch.bfloat16, 128, 16)
    assert kv_cache.activation_bytes(config, torch.bfloat16, 256, 16) > base
    more = kv_cache.activation_bytes(config, torch.bfloat16, 128, 17)
    assert more - base == config.vocab_size * (2 + 12)


def test_the_host_has_free_memory() -> None:
    assert 0 < kv_cache.free_bytes(CPU) < 1 << 50


def test_an_arena_too_large_for_the_device_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.zeros", refuse)
    with pytest.raises(ModelError, match=r"model.device cpu: no room for 64 places"):
        kv_cache.allocate(facts(tiny_exaone3(tmp_path)), 64, torch.float32, CPU)
