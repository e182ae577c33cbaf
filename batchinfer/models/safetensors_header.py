"""What a safetensors file holds, from its first bytes: names, shapes and places of its tensors.

The format (https://huggingface.co/docs/safetensors): 8 bytes header length, little-endian; the header, a JSON
object of name -> {dtype, shape, data_offsets: [begin, end)}; the tensors' bytes, offsets counted from there.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import ModelError

__all__ = ["SafetensorsHeader", "TensorHeader", "read_safetensors_header"]

_LENGTH_BYTES = 8
#: The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor: ``dtype`` as the format spells it (BF16, F32), bytes ``begin .. end - 1`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """``raw`` is the header as written, for hashing; ``size_bytes`` is the whole file's."""

    tensors: dict[str, TensorHeader]
    raw: bytes
    size_bytes: int


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of one file; tensor bytes are not read.

    Raises ModelError for a file that is not safetensors, or shorter than its header says.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
                raise ModelError(_broken(path, "its first bytes are not a safetensors header"))
            raw = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    base = _LENGTH_BYTES + header_bytes
    try:
        tensors = {
            name: TensorHeader(
                dtype=str(entry["dtype"]),
                shape=tuple(int(length) for length in entry["shape"]),
                begin=base + int(entry["data_offsets"][0]),
                end=base + int(entry["data_offsets"][1]),
            )
            for name, entry in json.loads(raw).items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(_broken(path, f"its header cannot be understood ({error})")) from error
    for name, tensor in tensors.items():
        if not base <= tensor.begin <= tensor.end or min(tensor.shape, default=0) < 0:
            raise ModelError(_broken(path, f"the tensor {name[:_SHOWN_CHARS]} has no place in it"))
    missing_bytes = max((tensor.end for tensor in tensors.values()), default=base) - size_bytes
    if missing_bytes > 0:
        raise ModelError(_broken(path, f"it is {missing_bytes:,} bytes too short"))
    return SafetensorsHeader(tensors, raw, size_bytes)


def _broken(path: Path, what: str) -> str:
    return f"{path}: not a whole safetensors file: {what}; copy or download it again"
