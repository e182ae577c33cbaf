"""Tiny random checkpoints in hub layout, one per family: written in well under a second, the same for the same seed.

Each ``tiny_*`` writes into ``directory`` (made if missing) and returns it. They differ from the real ones in
size and in their tokenizer alone: byte-level BPE of some 300 tokens that can spell any text.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

#: As the tokenizer_config.json of EXAONE 3.0 and 3.5 has it.
EXAONE3_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
#: As the chat_template.jinja of EXAONE 4.0 has it.
EXAONE4_TEMPLATE = (Path(__file__).parent / "exaone4_chat_template.jinja").read_text(encoding="utf-8")
#: For the other families: their shape, not their text.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '[|endofturn|]\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
_END_OF_TURN = "[|endofturn|]"
_MERGED_WORDS = ("user", "system", "Ġthe", "Ġof", "Ġand", "Ġto", "Ġin", "Ġa", "ing", "er", "on", "re", "Ġis", "ed")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = list(dict.fromkeys((word[:length], word[length]) for word in _MERGED_WORDS for length in range(1, len(word))))
_VOCABULARY = [*_SPECIAL, *_BYTES, *(left + right for left, right in _MERGES), _END_OF_TURN]

VOCAB_SIZE = len(_VOCABULARY)
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1, VOCAB_SIZE - 1
MAX_MODEL_LEN = 512

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LLAMA_NAMES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.attention.q_proj": "self_attn.q_proj",
    "attn.attention.k_proj": "self_attn.k_proj",
    "attn.attention.v_proj": "self_attn.v_proj",
    "attn.attention.out_proj": "self_attn.o_proj",
    "mlp.c_fc_0": "mlp.gate_proj",
    "mlp.c_fc_1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def tiny_exaone3(
    directory: Path,
    *,
    seed: int = 0,
    with_tokenizer: bool = True,
    chat_template: str | None = EXAONE3_TEMPLATE,
    num_weight_files: int = 1,
) -> Path:
    """Like EXAONE 3.0: no rope scaling, untied head."""
    _write_exaone(directory, {"tie_word_embeddings": False}, seed, num_weight_files)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_exaone35(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = EXAONE3_TEMPLATE
) -> Path:
    """Like EXAONE 3.5 7.8B and 32B: rope scaling as in Llama 3, untied head."""
    config = {"rope_theta": 1e6, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": False}
    _write_exaone(directory, config, seed, num_weight_files=1)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_exaone35_tied(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = EXAONE3_TEMPLATE
) -> Path:
    """Like EXAONE 3.5 2.4B: tied by default (the key is missing), head_dim stated and not a power of two."""
    config = {"rope_theta": 1e6, "rope_scaling": _LLAMA3_ROPE, "head_dim": 12}
    _write_exaone(directory, config, seed, num_weight_files=1)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_exaone4(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = EXAONE4_TEMPLATE
) -> Path:
    """Like EXAONE 4.0 32B: three layers with a window of 8 tokens, then one that sees everything."""
    from transformers import Exaone4Config, Exaone4ForCausalLM

    config = Exaone4Config(
        **_sizes(num_hidden_layers=4), sliding_window=8, sliding_window_pattern="LLLG", layer_types=_hybrid(4)
    )
    _write_native(directory, lambda: Exaone4ForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template, template_file="chat_template.jinja")


def tiny_exaone_moe(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = EXAONE4_TEMPLATE
) -> Path:
    """Like K-EXAONE: one dense layer, then experts, and the windows of EXAONE 4.0."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    config = ExaoneMoeConfig(
        **_sizes(num_hidden_layers=4),
        sliding_window=8,
        sliding_window_pattern="LLLG",
        layer_types=_hybrid(4),
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    _write_native(directory, lambda: ExaoneMoeForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template, template_file="chat_template.jinja")


def tiny_llama(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = PLAIN_TEMPLATE
) -> Path:
    """Like Llama 3.1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_sizes(), rope_parameters={"rope_theta": 5e5, **_LLAMA3_ROPE})
    _write_native(directory, lambda: LlamaForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_gemma2(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = PLAIN_TEMPLATE
) -> Path:
    """Like Gemma 2: capped scores, every other layer with a window of 8 tokens, tied head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **{**_sizes(), "tie_word_embeddings": True}, head_dim=8, sliding_window=8, query_pre_attn_scalar=8
    )
    _write_native(directory, lambda: Gemma2ForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_qwen2(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = PLAIN_TEMPLATE
) -> Path:
    """Like Qwen 2: biases on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_sizes())
    _write_native(directory, lambda: Qwen2ForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_phi3(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = PLAIN_TEMPLATE
) -> Path:
    """Like Phi 3: one matrix for queries, keys and values, one for gate and up."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**_sizes(), original_max_position_embeddings=MAX_MODEL_LEN)
    _write_native(directory, lambda: Phi3ForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template)


def tiny_mistral(
    directory: Path, *, seed: int = 0, with_tokenizer: bool = True, chat_template: str | None = PLAIN_TEMPLATE
) -> Path:
    """Like Mistral 7B: a window of 8 tokens in every layer."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**_sizes(), sliding_window=8)
    _write_native(directory, lambda: MistralForCausalLM(config), seed)
    return _finish(directory, with_tokenizer, chat_template)


#: Every family, by name.
TINY: dict[str, Callable[[Path], Path]] = {
    "exaone3": tiny_exaone3,
    "exaone35": tiny_exaone35,
    "exaone35_tied": tiny_exaone35_tied,
    "exaone4": tiny_exaone4,
    "exaone_moe": tiny_exaone_moe,
    "llama": tiny_llama,
    "gemma2": tiny_gemma2,
    "qwen2": tiny_qwen2,
    "phi3": tiny_phi3,
    "mistral": tiny_mistral,
}


def llama_twin(exaone_directory: Path, directory: Path) -> Path:
    """The weights of a tiny EXAONE 3.x directory under Llama's names, as a plain Llama directory beside it.

    Written by hand here, so that it shares no line with what it is compared with.
    """
    exaone = json.loads((exaone_directory / "config.json").read_text())
    tied = exaone.get("tie_word_embeddings", True)
    head_dim = exaone.get("head_dim", exaone["hidden_size"] // exaone["num_attention_heads"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{
            name: exaone[name]
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            )
        },
        "num_hidden_layers": exaone["num_layers"],
        "hidden_act": "silu",
        "rms_norm_eps": exaone["layer_norm_epsilon"],
        "rope_theta": exaone["rope_theta"],
        "rope_scaling": exaone["rope_scaling"],
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }
    weights = load_file(exaone_directory / "model.safetensors")
    twin = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
    }
    for index in range(exaone["num_layers"]):
        for old, new in _LLAMA_NAMES.items():
            twin[f"model.layers.{index}.{new}.weight"] = weights[f"transformer.h.{index}.{old}.weight"]
    if not tied:
        twin["lm_head.weight"] = weights["lm_head.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    save_file(twin, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_tokenizer(directory: Path, *, chat_template: str | None, template_file: str | None = None) -> None:
    """Tokenizer files as EXAONE's: digits split one by one, turns end in a special token.

    The chat template goes into tokenizer_config.json, or into ``template_file`` where one is named.
    """
    vocabulary = {token: index for index, token in enumerate(_VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*_SPECIAL, _END_OF_TURN)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "[BOS]",
        "eos_token": _END_OF_TURN,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_MODEL_LEN,
    }
    if chat_template is not None and template_file is not None:
        (directory / template_file).write_text(chat_template, encoding="utf-8")
    elif chat_template is not None:
        config["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", config)


def _write_exaone(directory: Path, overrides: dict[str, Any], seed: int, num_weight_files: int) -> None:
    config: dict[str, Any] = {
        "architectures": ["ExaoneForCausalLM"],
        # As on the hub: the trap that makes Auto classes ask whether to run LG's code.
        "auto_map": {
            "AutoConfig": "configuration_exaone.ExaoneConfig",
            "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
        },
        "model_type": "exaone",
        "activation_function": "silu",
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": MAX_MODEL_LEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_layers": 2,
        "rope_scaling": None,
        "rope_theta": 500000,
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        **overrides,
    }
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte": (VOCAB_SIZE, hidden), "transformer.ln_f": (hidden,)}
    for index in range(config["num_layers"]):
        shapes |= {
            f"transformer.h.{index}.ln_1": (hidden,),
            f"transformer.h.{index}.ln_2": (hidden,),
            f"transformer.h.{index}.attn.attention.q_proj": (queries, hidden),
            f"transformer.h.{index}.attn.attention.k_proj": (keys, hidden),
            f"transformer.h.{index}.attn.attention.v_proj": (keys, hidden),
            f"transformer.h.{index}.attn.attention.out_proj": (hidden, queries),
            f"transformer.h.{index}.mlp.c_fc_0": (inner, hidden),
            f"transformer.h.{index}.mlp.c_fc_1": (inner, hidden),
            f"transformer.h.{index}.mlp.c_proj": (hidden, inner),
        }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head"] = (VOCAB_SIZE, hidden)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_weights(directory, weights, num_weight_files)


def _write_weights(directory: Path, weights: dict[str, torch.Tensor], num_weight_files: int) -> None:
    if num_weight_files == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return
    names = list(weights)
    weight_map = {}
    for index in range(num_weight_files):
        file_name = f"model-{index + 1:05d}-of-{num_weight_files:05d}.safetensors"
        part = {name: weights[name] for name in names[index::num_weight_files]}
        save_file(part, directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_native(directory: Path, build: Callable[[], Any], seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build().save_pretrained(directory)


def _finish(directory: Path, with_tokenizer: bool, chat_template: str | None, template_file: str | None = None) -> Path:
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID},
    )
    if with_tokenizer:
        write_tokenizer(directory, chat_template=chat_template, template_file=template_file)
    return directory


def _sizes(num_hidden_layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.2,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "tie_word_embeddings": False,
    }


def _hybrid(num_layers: int) -> list[str]:
    return ["full_attention" if index % 4 == 3 else "sliding_attention" for index in range(num_layers)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
