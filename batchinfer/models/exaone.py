"""EXAONE 3.0, 3.5 and Deep as what they are: Llama under other names.

Their ``config.json`` says ``"model_type": "exaone"``, which transformers does not know; the code LG ships
beside the weights fails on transformers 5 (and where it runs, it leaves the rotary frequencies unset). The
architecture itself is Llama's: RMSNorm, rotate-half rotary embedding, grouped-query attention, SwiGLU, no
biases. So a checkpoint is loaded into ``LlamaForCausalLM`` by renaming alone, exactly and without its code.

Names and defaults are those of LG's ``ExaoneConfig`` and of the tensors LG publishes.
"""

from collections.abc import Mapping

from batchinfer.errors import ModelError

__all__ = [
    "EXAONE3",
    "EXAONE_MODEL_TYPES",
    "KEY_MAPPING",
    "TensorShapes",
    "expected_tensors",
    "llama_config_values",
]

#: ``model_type`` of EXAONE 3.0, 3.5 and Deep.
EXAONE3 = "exaone"
#: Families that share EXAONE's tokenizer (byte-level BPE that splits digits, vocabulary 102400).
EXAONE_MODEL_TYPES = frozenset({EXAONE3, "exaone4", "exaone_moe"})

#: Tensor name -> shape.
TensorShapes = dict[str, tuple[int, ...]]

#: For ``from_pretrained(key_mapping=...)``: regular expression -> replacement, applied to each name in turn.
KEY_MAPPING = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.": "model.layers.",
    r"\.ln_1\.": ".input_layernorm.",
    r"\.ln_2\.": ".post_attention_layernorm.",
    r"\.attn\.attention\.out_proj\.": ".self_attn.o_proj.",
    r"\.attn\.attention\.": ".self_attn.",
    r"\.mlp\.c_fc_0\.": ".mlp.gate_proj.",
    r"\.mlp\.c_fc_1\.": ".mlp.up_proj.",
    r"\.mlp\.c_proj\.": ".mlp.down_proj.",
}

#: ``ExaoneConfig`` field -> (``LlamaConfig`` field, ``ExaoneConfig``'s default).
_RENAMED = {
    "vocab_size": ("vocab_size", 102400),
    "hidden_size": ("hidden_size", 2048),
    "num_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 32),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "activation_function": ("hidden_act", "silu"),
    "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
    "attention_dropout": ("attention_dropout", 0.0),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", None),
    # transformers 4 tied unless told otherwise and left the key out of config.json; LlamaConfig does not tie.
    "tie_word_embeddings": ("tie_word_embeddings", True),
}


def llama_config_values(config: Mapping[str, object]) -> dict[str, object]:
    """Keyword arguments of the ``LlamaConfig`` that computes what this EXAONE 3.x ``config.json`` describes.

    A missing field takes the default of LG's ``ExaoneConfig``, not Llama's. Dropout fields do not matter in
    inference; unknown fields are left out. Raises ModelError where a size is not a whole number or the heads
    do not fit together.
    """
    values: dict[str, object] = {new: config.get(old, default) for old, (new, default) in _RENAMED.items()}
    hidden_size = _size(values, "hidden_size")
    num_heads = _size(values, "num_attention_heads")
    # ExaoneConfig treats null like a missing field for these three.
    values["num_key_value_heads"] = config.get("num_key_value_heads") or num_heads
    values["intermediate_size"] = config.get("intermediate_size") or 4 * hidden_size
    values["head_dim"] = config.get("head_dim") or hidden_size // num_heads
    if num_heads % _size(values, "num_key_value_heads"):
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{values['num_key_value_heads']}; this is not an EXAONE 3.x configuration"
        )
    values["rope_parameters"] = _rope_parameters(config)
    return values


def expected_tensors(config: Mapping[str, object]) -> TensorShapes:
    """Every tensor, under LG's name, that a checkpoint with this ``config.json`` holds, and its shape.

    Nothing else may be in it and nothing may be missing. ``lm_head.weight`` is left out when the embedding is
    tied. Raises ModelError as :func:`llama_config_values` does.
    """
    values = llama_config_values(config)
    vocab, hidden, inner = (_size(values, name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    head_dim = _size(values, "head_dim")
    queries = _size(values, "num_attention_heads") * head_dim
    keys = _size(values, "num_key_value_heads") * head_dim
    layer: TensorShapes = {
        "ln_1.weight": (hidden,),
        "ln_2.weight": (hidden,),
        "attn.attention.q_proj.weight": (queries, hidden),
        "attn.attention.k_proj.weight": (keys, hidden),
        "attn.attention.v_proj.weight": (keys, hidden),
        "attn.attention.out_proj.weight": (hidden, queries),
        "mlp.c_fc_0.weight": (inner, hidden),
        "mlp.c_fc_1.weight": (inner, hidden),
        "mlp.c_proj.weight": (hidden, inner),
    }
    shapes: TensorShapes = {"transformer.wte.weight": (vocab, hidden), "transformer.ln_f.weight": (hidden,)}
    for index in range(_size(values, "num_hidden_layers")):
        shapes |= {f"transformer.h.{index}.{name}": shape for name, shape in layer.items()}
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _rope_parameters(config: Mapping[str, object]) -> dict[str, object]:
    """``rope_theta`` beside ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5) as the latter."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: rope_scaling must be a mapping or null, not {given!r}")
    rope: dict[str, object] = {"rope_theta": config.get("rope_theta", 10000.0), **given}
    # Configs older than transformers 4.45 say "type".
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    return rope


def _size(values: Mapping[str, object], name: str) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {name} must be a whole number above 0, not {value!r}")
    return value
