"""Whether a model and its KV cache fit a device, by the engine's own arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from batchinfer.devices import CONTEXT_BYTES, Gpu
from batchinfer.errors import ModelError
from batchinfer.models.files import read_config, weight_files
from batchinfer.models.safetensors_header import read_safetensors_header
from batchinfer.spec import EngineSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Sizes that GPUs for inference have, for a machine without one.
COMMON_GIB = (24, 40, 48, 80, 141)
_FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True, slots=True)
class Device:
    """A device that a replica may have: ``count`` of them on this machine, 0 = one that is only thought of.

    ``free_bytes`` is None for this machine's own memory: what is free there is seen when the fit is computed.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    free_bytes: int | None
    count: int = 0


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """What is left on a device for keys and values once the weights are there, in tokens of all sequences together."""

    device: Device
    num_tokens: int
    #: Sequences at once, whatever their length.
    max_rows: int
    #: Whether one sequence of the longest length fits, without which the engine does not start.
    fits: bool

    def num_sequences(self, length: float) -> int:
        """How many sequences of this length, prompt and completion together, it holds at once."""
        return min(self.max_rows, int(self.num_tokens / max(1.0, length)))


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """A model's needs, and how devices meet them."""

    engine: Literal["continuous", "padded"]
    dtype: str
    #: None where the weights are not on this machine and their number follows from no configuration known here.
    weights_bytes: int | None
    kv_bytes_per_token: int
    fits: tuple[DeviceFit, ...]


def devices_of(gpus: Sequence[Gpu], asked_gib: float | None, *, on_cpu: bool) -> tuple[Device, ...]:
    """The devices to tell of: one of the size asked for, else this machine's GPUs, else its memory and common sizes.

    ``on_cpu``: the job computes on processors, whatever devices there are.
    """
    if asked_gib is not None:
        return (_thought_of(asked_gib),)
    if on_cpu or not gpus:
        here = (Device("this host", "cpu", None, 1),)
        return here if on_cpu else (*here, *map(_thought_of, COMMON_GIB))
    kinds: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        kinds.setdefault(gpu.name, []).append(gpu)
    return tuple(
        Device(name, "cuda", min(gpu.free_bytes for gpu in alike), len(alike)) for name, alike in kinds.items()
    )


def _thought_of(gib: float) -> Device:
    return Device(f"{gib:g} GiB GPU", "cuda", int(gib * 2**30) - CONTEXT_BYTES)


def fit_memory(
    directory: Path, dtype_name: str, engine: EngineSpec, max_model_len: int, devices: Sequence[Device]
) -> MemoryFit:
    """Compute the fit for each device. Imports torch and transformers: for a worker process.

    Raises ModelError for a model that no engine runs.
    """
    from batchinfer.engine.decoder_config import supported
    from batchinfer.models.architecture import check_architecture
    from batchinfer.models.loading import native_config

    values = read_config(directory)
    check_architecture(values)
    config = native_config(directory, values)
    reason = supported(config)
    if engine.kind == "continuous" and reason is not None:
        raise ModelError(f"{directory}: {reason}; use engine.kind=padded")
    if engine.kind != "padded" and reason is None:
        return _continuous_fit(directory, dtype_name, engine, max_model_len, devices, config)
    return _padded_fit(directory, dtype_name, engine, devices, config)


def _continuous_fit(
    directory: Path,
    dtype_name: str,
    engine: EngineSpec,
    max_model_len: int,
    devices: Sequence[Device],
    native: "PreTrainedConfig",
) -> MemoryFit:
    from batchinfer.engine import kv_cache
    from batchinfer.engine.decoder_config import decoder_config
    from batchinfer.engine.decoder_weights import expected_shapes
    from batchinfer.engine.reserve import reserved_bytes, step_size
    from batchinfer.models.loading import DTYPES

    config, dtype = decoder_config(native), DTYPES[dtype_name]
    weights_bytes = stored_weights_bytes(directory, dtype.itemsize)
    if weights_bytes is None:
        weights_bytes = sum(math.prod(shape) for shape in expected_shapes(config).values()) * dtype.itemsize
    fits = []
    for device in devices:
        rows, _ = step_size(device.kind, engine.max_batch_rows)
        reserved = reserved_bytes(config, dtype, device.kind, engine.max_batch_rows)
        free = _free_bytes(device) - weights_bytes
        places = min(
            kv_cache.places_within(max(0, free), config, dtype, device.kind, reserved_bytes=reserved),
            rows * max_model_len,
        )
        fits.append(DeviceFit(device, min(places, engine.max_batch_tokens or places), rows, places >= max_model_len))
    return MemoryFit("continuous", dtype_name, weights_bytes, kv_cache.bytes_per_place(config, dtype), tuple(fits))


def _padded_fit(
    directory: Path, dtype_name: str, engine: EngineSpec, devices: Sequence[Device], native: "PreTrainedConfig"
) -> MemoryFit:
    from batchinfer.engine.padded_limits import check_layers, default_max_rows, kv_bytes_per_token, tokens_within
    from batchinfer.models.loading import DTYPES

    check_layers(native)
    dtype = DTYPES[dtype_name]
    weights_bytes = stored_weights_bytes(directory, dtype.itemsize)
    fits = []
    for device in devices if weights_bytes is not None else ():
        free = _free_bytes(device) - (weights_bytes or 0)
        tokens = tokens_within(max(0, free), native, dtype, device.kind)
        rows = engine.max_batch_rows or default_max_rows(device.kind)
        # This engine starts with any memory at all, and says of a row alone that does not fit.
        fits.append(DeviceFit(device, min(tokens, engine.max_batch_tokens or tokens), rows, tokens > 0))
    return MemoryFit("padded", dtype_name, weights_bytes, kv_bytes_per_token(native, dtype), tuple(fits))


def stored_weights_bytes(directory: Path, itemsize: int) -> int | None:
    """Bytes of the weights once loaded, from the headers of their files; None where they are not on this machine.

    Floating-point tensors are cast to ``itemsize`` bytes a number, others stay what they are.
    """
    try:
        files = weight_files(directory)
    except ModelError:
        return None
    return sum(
        math.prod(tensor.shape) * itemsize if tensor.dtype in _FLOATS else tensor.end - tensor.begin
        for path in files
        for tensor in read_safetensors_header(path).tensors.values()
    )


def _free_bytes(device: Device) -> int:
    if device.free_bytes is not None:
        return device.free_bytes
    from batchinfer.engine.kv_cache import host_free_bytes

    return host_free_bytes()
