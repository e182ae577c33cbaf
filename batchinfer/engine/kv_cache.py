"""Where keys and values live: one flat arena of token places per layer, and how large it may be."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.errors import ModelError

__all__ = [
    "KvCache",
    "activation_bytes",
    "allocate",
    "bytes_per_place",
    "free_bytes",
    "host_free_bytes",
    "num_places",
    "places_within",
]

#: Share of the free memory that the cache and a step's activations may take. A GPU is the replica's alone; what is
#: left there covers the allocator's fragments and the libraries' workspaces. A host has other work to do.
_SHARE = {"cpu": 0.4, "cuda": 0.92}


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of every layer: L layers, N places, K key/value heads, D head dimension.

    Which place belongs to whom is the scheduler's to know. Places nobody has written hold zeros on a CPU and
    anything, NaN included, on a GPU.
    """

    keys_LNKD: torch.Tensor
    values_LNKD: torch.Tensor

    @property
    def num_places(self) -> int:
        return int(self.keys_LNKD.shape[1])


def bytes_per_place(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def activation_bytes(config: DecoderConfig, dtype: torch.dtype, max_step_tokens: int, max_logits_rows: int) -> int:
    """What a step needs beside weights and cache, leaving out the scratch memory of attention.

    At the widest point a token has its residual, its normed copy, the gate, up and their product; a row that
    samples has its logits in the model's dtype and, in the sampler, in float32 with one sorted copy.
    """
    per_token = (4 * config.hidden_size + 2 * config.qkv_size + 3 * config.inner_size) * dtype.itemsize
    per_row = config.vocab_size * (dtype.itemsize + 3 * torch.float32.itemsize)
    return max_step_tokens * per_token + max_logits_rows * per_row


def places_within(
    num_free_bytes: int, config: DecoderConfig, dtype: torch.dtype, device_type: str, *, reserved_bytes: int
) -> int:
    """How many places a device of this type holds with so much memory free, ``reserved_bytes`` kept for activations."""
    return max(0, int(num_free_bytes * _SHARE[device_type]) - reserved_bytes) // bytes_per_place(config, dtype)


def num_places(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device, *, reserved_bytes: int, min_places: int
) -> int:
    """How many places fit the memory that is free now, once the weights are loaded.

    ``reserved_bytes`` are kept for activations. Raises ModelError where fewer than ``min_places`` fit: not even
    one sequence of the longest length could run.
    """
    num_free_bytes = free_bytes(device)
    places = places_within(num_free_bytes, config, dtype, device.type, reserved_bytes=reserved_bytes)
    if places < min_places:
        usable = int(num_free_bytes * _SHARE[device.type]) - reserved_bytes
        needed_gb = (min_places * bytes_per_place(config, dtype) + reserved_bytes) / 1e9
        raise ModelError(
            f"model.device {device}: keys and values of one sequence of {min_places:,} tokens take {needed_gb:.2f} GB "
            f"with a step's activations, but only {max(0, usable + reserved_bytes) / 1e9:.2f} GB are to be had; lower "
            "model.max_model_len, or use a smaller model or a larger device"
        )
    return places


def allocate(config: DecoderConfig, places: int, dtype: torch.dtype, device: torch.device) -> KvCache:
    """An arena of ``places`` places; on a CPU its pages are taken from the system only as they are written.

    Raises ModelError when the device refuses.
    """
    try:
        shape = (config.num_layers, places, config.num_kv_heads, config.head_dim)
        if device.type == "cpu":
            return KvCache(_cpu_arena(shape, dtype), _cpu_arena(shape, dtype))
        return KvCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
    except (torch.OutOfMemoryError, MemoryError) as error:
        size_gb = places * bytes_per_place(config, dtype) / 1e9
        raise ModelError(
            f"model.device {device}: no room for {places:,} places of keys and values ({size_gb:.2f} GB); set a lower "
            "limit of tokens for the engine"
        ) from error


def _cpu_arena(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Unlike torch's, numpy's zeros are pages the system clears when they are first touched.
    zeros = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
    return zeros.view(dtype).view(shape)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses: of the GPU, or of the host as far as the container's limit leaves it."""
    if device.type == "cuda":
        # What torch's allocator holds without using is free to us, but the driver counts it as taken.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return host_free_bytes()


def host_free_bytes() -> int:
    """Memory of the host that nobody uses, as far as the container's limit leaves it."""
    free = 4 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, max(0, int(limit) - used))
    except OSError:
        # Not Linux, or no cgroup v2: what has been found so far stands.
        pass
    return free
