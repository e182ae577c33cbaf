"""A model directory as files: is everything there that loading needs, and how long may a sequence be.

Nothing here loads a weight or needs torch, so a job can be refused before any GPU is taken.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from batchinfer.errors import ModelError
from batchinfer.models.exaone import EXAONE3, EXAONE_MODEL_TYPES, expected_tensors
from batchinfer.models.safetensors_header import read_safetensors_header

__all__ = [
    "CONFIG_FILES",
    "TOKENIZER_FILES",
    "check_config_files",
    "check_model_files",
    "check_weight_names",
    "has_chat_template",
    "has_tokenizer",
    "max_model_len",
    "model_type",
    "read_config",
    "read_generation_config",
    "vocab_size",
    "weight_files",
]

CONFIG_FILES = ("config.json", "generation_config.json")
#: Every file that can change how text becomes token ids, in the hub's names.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
)

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
_NUM_NAMED = 3
#: Far above any configuration; a larger file is read by nobody.
_MAX_JSON_BYTES = 64 * 2**20
#: Far above any model: more of these and building the empty model alone would take the machine.
_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 100_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 1_000_000),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "moe_intermediate_size", "vocab_size"), 10**9),
}

#: Where configurations keep the longest sequence the model was made for, by age and family.
_LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")

#: Not causal language models, though their names suggest it, and what to run instead.
_REFUSED_MODEL_TYPES = {
    "exaone4_5": "EXAONE 4.5 reads images and text; only text models are supported, use EXAONE 4.0 or K-EXAONE",
    "exaone4_5_vision": "this is the image encoder of EXAONE 4.5 alone; use EXAONE 4.0 or K-EXAONE",
}

_TO_SAFETENSORS = (
    "pickles can run code and are never loaded; if you trust them, convert each once: "
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
    "'model.safetensors', {'format': 'pt'})\""
)


def read_config(directory: Path) -> dict[str, object]:
    """``config.json`` of a model directory. Raises ModelError when it is missing or not a JSON object."""
    config = _read_json(directory / "config.json")
    if config is None:
        raise ModelError(
            f"{directory}: no config.json; model.path must name a directory in hub layout "
            "(config.json, *.safetensors, tokenizer files)"
        )
    return config


def read_generation_config(directory: Path) -> dict[str, object]:
    """``generation_config.json``, or an empty mapping where the checkpoint has none."""
    return _read_json(directory / "generation_config.json") or {}


def model_type(config: Mapping[str, object]) -> str:
    """The family, as ``config.json`` names it. Raises ModelError for none, or one that cannot be run here."""
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        raise ModelError('config.json: no "model_type"; use a checkpoint in the hub layout of transformers')
    if name in _REFUSED_MODEL_TYPES:
        raise ModelError(f"config.json: model_type {name}: {_REFUSED_MODEL_TYPES[name]}")
    return name


def max_model_len(config: Mapping[str, object], asked: int | None = None) -> int:
    """Prompt and completion together, in tokens: what the job asks for, or the model's own limit.

    Raises ModelError when the job asks for more than the model was made for, or neither says.
    """
    default = 2048 if config.get("model_type") == EXAONE3 else None  # ExaoneConfig's
    limits = (config.get(field) for field in _LIMIT_FIELDS)
    limit = next((value for value in limits if isinstance(value, int) and value > 0), default)
    if limit is None and isinstance(text_config := config.get("text_config"), Mapping):
        return max_model_len(text_config, asked)
    if limit is None and asked is None:
        raise ModelError("config.json states no longest sequence (max_position_embeddings); set model.max_model_len")
    if limit is not None and asked is not None and asked > limit:
        raise ModelError(
            f"model.max_model_len {asked} is longer than the model's limit of {limit} (config.json); lower it or leave "
            "it out"
        )
    return asked if asked is not None else limit or 0


def vocab_size(config: Mapping[str, object]) -> int | None:
    """Number of the model's token ids; None where ``config.json`` leaves it to the family's own default."""
    size = config.get("vocab_size")
    if isinstance(size, int):
        return size
    if isinstance(text_config := config.get("text_config"), Mapping):
        return vocab_size(text_config)
    return 102400 if config.get("model_type") == EXAONE3 else None  # ExaoneConfig's


def check_model_files(directory: Path, *, needs_tokenizer: bool) -> None:
    """Refuse a directory that :func:`batchinfer.models.loading.load_model` could not load as it should.

    Reads headers only, whatever the weights' size. Raises ModelError that names what is wrong and the way
    out: no directory or config.json; a family that cannot be run; no weights, pickles only, a shard of the
    index missing, a truncated file; for EXAONE 3.x every missing, unexpected or misshapen tensor; no tokenizer.
    """
    check_config_files(directory, needs_tokenizer=needs_tokenizer)
    config = read_config(directory)
    shapes = {
        name: tensor.shape
        for path in weight_files(directory)
        for name, tensor in read_safetensors_header(path).tensors.items()
    }
    if config["model_type"] == EXAONE3:
        _check_exaone3_tensors(directory, config, shapes)


def check_config_files(directory: Path, *, needs_tokenizer: bool) -> None:
    """The part of :func:`check_model_files` that needs no weights: the small files of a checkpoint."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory; check model.path")
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory}: holds a PEFT adapter; merge it into its base model (merge_and_unload) and name the result"
        )
    config = read_config(directory)
    wanted = _tokenizer_files(model_type(config))
    _check_sizes(config)
    if needs_tokenizer and not has_tokenizer(directory):
        raise ModelError(
            f"{directory}: no tokenizer ({', '.join(wanted)}); copy the tokenizer files of the model it was made "
            "from, or give the job token ids (prompt.token_ids)"
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether the vocabulary of a tokenizer lies in the directory."""
    wanted = _tokenizer_files(model_type(read_config(directory)))
    return any((directory / name).exists() for name in wanted)


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of the directory will have a chat template, as far as its files tell.

    A ``chat_template.json`` does not count: transformers gives it to processors of images and sound, not to tokenizers.
    """
    if (directory / "chat_template.jinja").exists():
        return True
    return bool((_read_json(directory / "tokenizer_config.json") or {}).get("chat_template"))


def _tokenizer_files(family: str) -> tuple[str, ...]:
    """Any of these holds the vocabulary; EXAONE's is used as its tokenizer.json says, never rebuilt."""
    return ("tokenizer.json",) if family in EXAONE_MODEL_TYPES else _TOKENIZER_VOCABULARIES


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of the model, in order of names. Raises ModelError for none, or where one is missing."""
    check_weight_names((path.name for path in directory.iterdir()), str(directory))
    if (directory / _WEIGHTS).exists():
        return (directory / _WEIGHTS,)
    index = _read_json(directory / _WEIGHTS_INDEX) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ModelError(f"{directory / _WEIGHTS_INDEX}: no weight_map; copy or download the file again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{directory / _WEIGHTS_INDEX}: names files outside the directory: {_few(outside)}")
    foreign = [name for name in names if not name.endswith(".safetensors")]
    if foreign:
        raise ModelError(f"{directory / _WEIGHTS_INDEX}: names files that are not safetensors: {_few(foreign)}")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing: {_few(missing)}; "
            "copy or download them"
        )
    return tuple(directory / name for name in names)


def check_weight_names(names: Iterable[str], place: str) -> None:
    """Refuse a listing of file names (of a directory, of a hub repository) without safetensors in hub layout."""
    listed: Collection[str] = set(names)
    if _WEIGHTS in listed or _WEIGHTS_INDEX in listed:
        return
    pickles = sorted(name for name in listed if name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        raise ModelError(f"{place}: weights are pickles only ({_few(pickles)}); {_TO_SAFETENSORS}")
    others = sorted(name for name in listed if name.endswith((".safetensors", ".gguf")))
    found = f" (found {_few(others)})" if others else ""
    raise ModelError(
        f"{place}: no weights: neither {_WEIGHTS} nor {_WEIGHTS_INDEX}{found}; copy or download the checkpoint again"
    )


def _check_exaone3_tensors(
    directory: Path, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if config.get("quantization_config"):
        raise ModelError(
            f"{directory}: a quantised EXAONE 3.x checkpoint cannot be loaded; use the unquantised one of the same size"
        )
    expected = expected_tensors(config)
    if "lm_head.weight" in shapes:
        # A tied head is often stored twice after a conversion; transformers ties it only where the two are equal.
        expected.setdefault("lm_head.weight", expected["transformer.wte.weight"])
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(shapes[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    found = [
        f"{len(problems)} {kind}: {_few(problems)}"
        for kind, problems in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if problems
    ]
    if found:
        raise ModelError(
            f"{directory}: the tensors do not fit config.json (EXAONE 3.x, {len(expected)} tensors): "
            f"{'; '.join(found)}; use a complete checkpoint with its own config.json"
        )


def _check_sizes(config: Mapping[str, object]) -> None:
    for field, largest in _LARGEST.items():
        size = config.get(field)
        if isinstance(size, int | float) and abs(size) > largest:
            raise ModelError(f"config.json: {field} is above {largest:,}, which no model has; use an intact checkpoint")
    if isinstance(text_config := config.get("text_config"), Mapping):
        _check_sizes(text_config)


def _few(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"


def _read_json(path: Path) -> dict[str, object] | None:
    """None when there is no such file."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: is larger than {_MAX_JSON_BYTES:,} bytes; use an intact checkpoint")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; copy or download it again")
    return value
