from pathlib import Path

import pytest

from batchinfer.engine import build
from batchinfer.engine.build import build_engine
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.engine import Sequence
from batchinfer.engine.padded import PaddedEngine
from batchinfer.errors import ModelError
from batchinfer.records import Prompt, SamplingParams
from tests.tiny import tiny_exaone3, tiny_exaone_moe
from tests.unit.engine.tiny_models import drain


@pytest.fixture(scope="module")
def exaone3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exaone3")
    tiny_exaone3(directory)
    return directory


def test_auto_is_continuous_where_it_knows_the_model(exaone3: Path) -> None:
    built = build_engine("auto", exaone3, dtype="float32", device="cpu", max_batch_rows=3)
    assert isinstance(built.engine, ContinuousEngine)
    assert (built.name, built.device, built.engine.capacity) == ("continuous", "cpu", 3)


def test_padded_is_built_when_asked_for_with_the_given_limits(exaone3: Path) -> None:
    built = build_engine("padded", exaone3, dtype="float32", device="cpu", max_batch_rows=3, max_batch_tokens=99)
    assert isinstance(built.engine, PaddedEngine)
    assert (built.name, built.engine.capacity, built.engine.limits.max_tokens) == ("padded", 3, 99)


def test_a_model_that_continuous_does_not_know_gets_padded_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_exaone_moe(tmp_path)
    with caplog.at_level("INFO", logger="batchinfer"):
        assert build_engine("auto", tmp_path, dtype="float32", device="cpu").name == "padded"
    assert "exaone_moe" in caplog.text
    with pytest.raises(ModelError, match=r"engine\.kind=padded"):
        build_engine("continuous", tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("error", [EOFError("Ran out of input"), OSError(28, "No space left on device")])
def test_a_cache_of_kernels_that_fails_costs_speed_and_nothing_else(
    exaone3: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(decoder: Decoder) -> None:
        raise error

    monkeypatch.setattr(build, "compile_kernels", fail)
    prompt = Prompt("shard:0", (5, 6, 7), SamplingParams(max_new_tokens=4, ignore_eos=True))
    built = build_engine("continuous", exaone3, dtype="float32", device="cpu")
    assert "NUMBA_CACHE_DIR" in caplog.text
    monkeypatch.undo()
    undisturbed = build_engine("continuous", exaone3, dtype="float32", device="cpu")
    ends = [drain(each.engine, [Sequence(prompt)])["shard:0", 0] for each in (built, undisturbed)]
    assert ends[0].token_ids == ends[1].token_ids


def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded(exaone3: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.device=cpu"):
        build_engine("auto", exaone3, dtype="float32", device="cuda:99")
