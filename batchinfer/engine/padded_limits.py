"""How much the padded engine takes on by default: from the model's shape and the device's free memory."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from batchinfer.engine.batching import BatchLimits
from batchinfer.engine.kv_cache import free_bytes
from batchinfer.errors import ModelError

#: Layer types whose whole state is keys and values, in the names of transformers' ``layer_types``.
_KV_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

#: Share of the memory that is free once the weights are loaded; the rest is for activations and logits.
_KV_SHARE = {"cpu": 0.4, "cuda": 0.75}
_MAX_ROWS = {"cpu": 128, "cuda": 256}
_MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}


def check_layers(config: PreTrainedConfig) -> None:
    """Raises ModelError for layers with another state than keys and values (state space, linear attention, chunks)."""
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    foreign = sorted(layer_types - _KV_LAYER_TYPES)
    if foreign:
        raise ModelError(
            f"model type {config.model_type} has layers of type {', '.join(foreign)}, which the padded engine "
            f"cannot run; use a model with {' or '.join(sorted(_KV_LAYER_TYPES))} layers only"
        )


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of KV that one token takes in all layers."""
    text = config.get_text_config()
    num_heads: int = text.num_attention_heads
    num_kv_heads: int = getattr(text, "num_key_value_heads", None) or num_heads
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return 2 * int(text.num_hidden_layers) * num_kv_heads * head_dim * dtype.itemsize


def tokens_within(num_free_bytes: int, config: PreTrainedConfig, dtype: torch.dtype, device_type: str) -> int:
    """How many tokens of KV a device of this type holds with so much memory free."""
    return int(num_free_bytes * _KV_SHARE[device_type]) // kv_bytes_per_token(config, dtype)


def default_max_rows(device_type: str) -> int:
    """Sequences in a batch, unless the job says otherwise."""
    return _MAX_ROWS[device_type]


def default_limits(model: PreTrainedModel, max_rows: int | None, max_tokens: int | None) -> BatchLimits:
    """The given limits, completed from the device."""
    device = "cuda" if model.device.type == "cuda" else "cpu"
    if max_tokens is None:
        max_tokens = max(1, tokens_within(free_bytes(model.device), model.config, model.dtype, device))
    return BatchLimits(max_rows or _MAX_ROWS[device], max_tokens, _MAX_PREFILL_TOKENS[device])
