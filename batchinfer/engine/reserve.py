"""How much the continuous engine takes on at once, and the memory it keeps for that beside weights and KV cache."""

import torch

from batchinfer.engine import kv_cache
from batchinfer.engine.decoder_config import DecoderConfig

__all__ = ["reserved_bytes", "step_size"]

#: Sequences at once and tokens through the model in a step, unless the job says otherwise.
_MAX_ROWS = {"cpu": 256, "cuda": 1024}
_MAX_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
#: At most 64 MiB each for split rows, for a relocation and for a prefix's splits, in graphs once more.
_KERNEL_SCRATCH_BYTES = 384 << 20


def step_size(device_type: str, max_rows: int | None = None) -> tuple[int, int]:
    """(sequences at once, tokens through the model in a step) of the continuous engine; ``max_rows`` is the job's."""
    rows = max_rows or _MAX_ROWS[device_type]
    return rows, max(rows, _MAX_STEP_TOKENS[device_type])


def reserved_bytes(config: DecoderConfig, dtype: torch.dtype, device_type: str, max_rows: int | None = None) -> int:
    """What the continuous engine keeps for a step beside weights and KV cache."""
    rows, step_tokens = step_size(device_type, max_rows)
    reserved = kv_cache.activation_bytes(config, dtype, step_tokens, rows)
    if device_type == "cuda":
        # Graphs keep their activations in a pool of their own, and attention splits its work.
        reserved += kv_cache.activation_bytes(config, dtype, rows, rows) + _KERNEL_SCRATCH_BYTES
    return reserved
