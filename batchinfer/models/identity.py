"""What makes two model directories the same model, for a job's fingerprint."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from batchinfer.errors import ModelError
from batchinfer.models.files import CONFIG_FILES, TOKENIZER_FILES, weight_files
from batchinfer.models.safetensors_header import read_safetensors_header

__all__ = ["directory_identity", "tokenizer_identity"]

_SAMPLE_BYTES = 4096
_DIGITS = 16


def directory_identity(directory: Path) -> dict[str, str]:
    """File name -> short content hash of every file that decides what the model writes.

    Configuration and tokenizer files are hashed whole; a weight file by its name, size, header and the first
    and last 4 KiB of *each tensor*: a merged LoRA may leave a file's first and last tensor untouched. So a
    moved or renamed directory keeps its identity, and other weights of the same shapes have another one,
    after reading some megabytes of a model of any size. Raises ModelError when weights are missing or broken.
    """
    identity = _hashes(directory, (*CONFIG_FILES, *TOKENIZER_FILES))
    weights = hashlib.sha256()
    for path in weight_files(directory):
        header = read_safetensors_header(path)
        weights.update(f"{path.name}\0{header.size_bytes}\0".encode())
        weights.update(header.raw)
        with path.open("rb") as file:
            for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.begin):
                file.seek(tensor.begin)
                weights.update(file.read(min(_SAMPLE_BYTES, tensor.end - tensor.begin)))
                file.seek(max(tensor.begin, tensor.end - _SAMPLE_BYTES))
                weights.update(file.read(min(_SAMPLE_BYTES, tensor.end - tensor.begin)))
    identity["weights"] = weights.hexdigest()[:_DIGITS]
    return identity


def tokenizer_identity(directory: Path) -> dict[str, str]:
    """File name -> short content hash of the tokenizer files alone: all that the fake engine reads of a model."""
    return _hashes(directory, TOKENIZER_FILES)


def _hashes(directory: Path, names: Iterable[str]) -> dict[str, str]:
    return {
        name: hashlib.sha256(_read_bytes(directory / name)).hexdigest()[:_DIGITS]
        for name in names
        if (directory / name).exists()
    }


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
