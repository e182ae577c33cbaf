"""GPUs as nvidia-smi tells of them."""

import pytest

from batchinfer import devices
from batchinfer.devices import CONTEXT_BYTES, Gpu, gpus_of, local_gpus, processor_name

ANSWER = "NVIDIA H100 80GB HBM3, 81559, 0\nTesla, the old one, 16384, 16000\nnot a line\nX, [N/A], 3\n"
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, (81559 << 20) - CONTEXT_BYTES)
TESLA = Gpu("Tesla, the old one", 16384 << 20, 0)


def test_names_sizes_and_what_is_free_are_read() -> None:
    assert gpus_of(ANSWER) == (H100, TESLA)
    assert gpus_of("") == ()


@pytest.mark.parametrize(
    ("visible", "found"), [("1", (TESLA,)), ("1,0", (TESLA, H100)), ("", ()), ("-1", ()), ("GPU-8f2a", (H100,))]
)
def test_hidden_gpus_are_not_there(visible: str, found: tuple[Gpu, ...]) -> None:
    assert gpus_of(ANSWER, visible) == found


def test_a_machine_without_nvidia_smi_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_QUERY", ("no-such-program",))
    assert local_gpus() == ()


def test_the_processor_has_a_name() -> None:
    assert "cores" in processor_name()
