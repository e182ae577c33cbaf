"""The check before the first sequence: right kernels pass, wrong ones are told, and ``auto`` then falls back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchinfer.engine import build as building
from batchinfer.engine.build import build_engine, check_kernels
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import decoder_config
from batchinfer.engine.decoder_weights import DecoderWeights, load_weights
from batchinfer.engine.torch_ops import TorchOps
from batchinfer.engine.warm_up import MAX_DISTANCE, warm_up, warm_up_plans
from batchinfer.errors import ModelError
from tests.unit.engine.tiny_models import tiny_model

CPU = torch.device("cpu")


class WrongOps(TorchOps):
    """Scores three times as large as they should be, or NaN: what a bad compiler or a bad card may do."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spoil = spoil

    def decode_attention(self, q_RHD: torch.Tensor, *rest: Any) -> torch.Tensor:
        return TorchOps.decode_attention(self, self.spoil(q_RHD), *rest)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderWeights, Path]:
    model = tiny_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    config = decoder_config(model.config)
    weights = load_weights(config, sorted(directory.glob("*.safetensors")), dtype=torch.float32, device=CPU)
    return config, weights, directory


def test_equal_editions_have_no_distance(parts: tuple[Any, DecoderWeights, Path]) -> None:
    config, weights, _ = parts
    decoder, plain = (Decoder(config, weights, TorchOps(), 512) for _ in range(2))
    assert warm_up(decoder, plain, 512) < 1e-5
    check_kernels(decoder, plain, 512)


@pytest.mark.parametrize("spoil", [lambda q: q * 3, lambda q: q * float("nan")], ids=["wrong", "nan"])
def test_wrong_kernels_are_told(parts: tuple[Any, DecoderWeights, Path], spoil: Any) -> None:
    config, weights, _ = parts
    decoder, plain = Decoder(config, weights, WrongOps(spoil), 512), Decoder(config, weights, TorchOps(), 512)
    assert not warm_up(decoder, plain, 512) <= MAX_DISTANCE
    with pytest.raises(Exception, match="away from plain torch"):
        check_kernels(decoder, plain, 512)


def test_auto_falls_back_to_padded_where_the_check_fails(
    parts: tuple[Any, DecoderWeights, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise building._KernelsWrong("on cuda its kernels' logits are 1 away from plain torch's")

    monkeypatch.setattr(building, "_continuous", refuse)
    directory = parts[2]
    assert build_engine("auto", directory, dtype="float32", device="cpu").name == "padded"
    assert "away from plain torch's" in caplog.text
    with pytest.raises(ModelError, match=r"use engine\.kind=padded"):
        build_engine("continuous", directory, dtype="float32", device="cpu")


@pytest.mark.parametrize(("num_places", "max_positions"), [(64, 40), (300, 512), (1280, 64), (20000, 4096)])
def test_plans_stay_inside_any_arena_and_any_model(num_places: int, max_positions: int) -> None:
    plans = list(warm_up_plans(num_places, max_positions))
    assert len(plans) > 20
    for plan in plans:
        for row in plan.decode:
            assert row.position < max_positions
            assert row.offset + row.position - row.prefix_length < num_places
        for chunk in plan.prefill:
            assert chunk.stop <= max_positions
            assert chunk.offset + chunk.stop - chunk.prefix_length <= num_places
