"""Weights of the lean decoder: from safetensors files straight to fused tensors on the device.

Tensors are read one at a time into their place in a fused tensor, cast on the way, layer by layer; beyond the model
itself at most one layer is in memory twice. What the files hold is compared with what the configuration asks for
before the first byte of a weight is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from batchinfer.engine.decoder_config import DecoderConfig
from batchinfer.engine.linear import Linear, linear
from batchinfer.errors import ModelError

__all__ = ["DecoderWeights", "LayerWeights", "expected_shapes", "load_weights", "random_weights"]

_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
#: Tables that old checkpoints saved beside their weights; they follow from the configuration.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_DTYPES = frozenset({"F32", "F16", "BF16", "F64"})
_NUM_NAMED = 3

#: ``read(name, shape)``: a tensor of that shape, on any device, in any dtype.
_Read = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Rows of ``qkv`` are query heads, key heads, value heads; of ``gate_up`` the gate, then up."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    before_attention_E: torch.Tensor | None
    after_attention_E: torch.Tensor | None
    before_mlp_E: torch.Tensor | None
    after_mlp_E: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a model, on one device and in one dtype."""

    embedding_VE: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_E: torch.Tensor
    head: Linear

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VE.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VE.device


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor, under transformers' names, that a checkpoint of this model holds; a tied head is left out."""
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, config.hidden_size),
        _FINAL_NORM: (config.hidden_size,),
    }
    if not config.tied:
        shapes[_HEAD] = shapes[_EMBEDDING]
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        for parts, num_columns, has_bias in _projections(config):
            for name, num_rows in parts:
                shapes[f"{prefix}{name}.weight"] = (num_rows, num_columns)
                if has_bias:
                    shapes[f"{prefix}{name}.bias"] = (num_rows,)
        for name, size in _norms(config):
            shapes[f"{prefix}{name}.weight"] = (size,)
    return shapes


def load_weights(
    config: DecoderConfig,
    files: SequenceOf[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    key_mapping: Mapping[str, str] | None = None,
) -> DecoderWeights:
    """The weights in ``files``, the whole set of a model's safetensors files.

    ``key_mapping`` renames tensors to transformers' names: regular expression -> replacement, each applied to every
    name in turn. Raises ModelError when a tensor is missing, left over, there twice, quantised or of another shape,
    and when the device's memory does not do.
    """
    with ExitStack() as stack:
        checkpoint = _Checkpoint(files, device, key_mapping or {}, stack)
        checkpoint.check(config)
        try:
            return _assemble(config, checkpoint.read, dtype, device, head_is_stored=checkpoint.has(_HEAD))
        except torch.OutOfMemoryError as error:
            size_gb = _num_weights(config) * dtype.itemsize / 1e9
            raise ModelError(
                f"model.device {device}: the weights take {size_gb:.1f} GB and do not fit its memory; "
                "use a smaller model or a larger GPU"
            ) from error


def random_weights(config: DecoderConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> DecoderWeights:
    """Normal(0, 0.02) matrices and norms of one: for timing a shape without its checkpoint."""
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0 - config.norm_unit_offset, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    return _assemble(config, read, dtype, device, head_is_stored=not config.tied)


class _Checkpoint:
    """The open files of a model, by transformers' tensor names."""

    def __init__(
        self, files: SequenceOf[Path], device: torch.device, key_mapping: Mapping[str, str], stack: ExitStack
    ) -> None:
        self._where = f"{files[0].parent}" if files else "no weight files"
        # safetensors ships no complete types: a file is whatever safe_open returns.
        self._tensors: dict[str, tuple[Any, str]] = {}
        twice = []
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=str(device)))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read ({error}); copy or download it again") from error
            for stored_name in file.keys():  # noqa: SIM118 (not a mapping)
                name = stored_name
                for pattern, replacement in key_mapping.items():
                    name = re.sub(pattern, replacement, name)
                if _COMPUTED.search(name):
                    continue
                if name in self._tensors:
                    twice.append(name)
                self._tensors[name] = (file, stored_name)
        if twice:
            raise ModelError(f"{self._where}: there are two tensors for {_few(twice)}; use a complete checkpoint")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor; the shape was checked by :meth:`check`. A tied model may hold its embedding as the head."""
        if name == _EMBEDDING and name not in self._tensors:
            name = _HEAD
        file, stored_name = self._tensors[name]
        tensor: torch.Tensor = file.get_tensor(stored_name)
        return tensor

    def check(self, config: DecoderConfig) -> None:
        """Refuse unless the files hold exactly what the model is made of, in the right shapes, unquantised."""
        expected = expected_shapes(config)
        if config.tied and self.has(_HEAD):
            expected[_HEAD] = expected[_EMBEDDING]
            if not self.has(_EMBEDDING):
                del expected[_EMBEDDING]
        found = {name: file.get_slice(stored_name) for name, (file, stored_name) in self._tensors.items()}
        problems = {
            "missing": sorted(expected.keys() - found.keys()),
            "left over": sorted(found.keys() - expected.keys()),
            "of another shape": [
                f"{name} is {list(found[name].get_shape())}, should be {list(shape)}"
                for name, shape in expected.items()
                if name in found and tuple(found[name].get_shape()) != shape
            ],
            "quantised": [
                f"{name} ({found[name].get_dtype()})"
                for name in expected
                if name in found and found[name].get_dtype() not in _DTYPES
            ],
        }
        named = [f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names]
        if named:
            raise ModelError(
                f"{self._where}: the weights do not fit config.json ({config.family}, {len(expected)} tensors): "
                f"{'; '.join(named)}; use a complete, unquantised checkpoint with its own config.json"
            )


def _assemble(
    config: DecoderConfig, read: _Read, dtype: torch.dtype, device: torch.device, *, head_is_stored: bool
) -> DecoderWeights:
    def vector(name: str, size: int) -> torch.Tensor:
        return _gather(read, ((name, (size,)),), dtype, device)

    def projection(prefix: str, parts: _Parts, num_columns: int, has_bias: bool) -> Linear:
        weights = tuple((f"{prefix}{name}.weight", (num_rows, num_columns)) for name, num_rows in parts)
        biases = tuple((f"{prefix}{name}.bias", (num_rows,)) for name, num_rows in parts)
        bias_O = _gather(read, biases, dtype, device) if has_bias else None
        return linear(_gather(read, weights, dtype, device), bias_O)

    layers = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        qkv, out, gate_up, down = (projection(prefix, *shape) for shape in _projections(config))
        norms = {name: vector(f"{prefix}{name}.weight", size) for name, size in _norms(config)}
        names = config.names
        layers.append(
            LayerWeights(
                qkv=qkv,
                out=out,
                gate_up=gate_up,
                down=down,
                q_norm_D=norms.get("self_attn.q_norm"),
                k_norm_D=norms.get("self_attn.k_norm"),
                before_attention_E=norms.get(names.before_attention or ""),
                after_attention_E=norms.get(names.after_attention or ""),
                before_mlp_E=norms.get(names.before_mlp or ""),
                after_mlp_E=norms.get(names.after_mlp or ""),
            )
        )
    table = (config.vocab_size, config.hidden_size)
    embedding_VE = _gather(read, ((_EMBEDDING, table),), dtype, device)
    head_VE = embedding_VE
    if head_is_stored:
        head_VE = _gather(read, ((_HEAD, table),), dtype, device)
        # Conversions often store a tied head a second time. transformers ties the two only where they are equal.
        if config.tied and torch.equal(head_VE, embedding_VE):
            head_VE = embedding_VE
    return DecoderWeights(
        embedding_VE=embedding_VE,
        layers=tuple(layers),
        final_norm_E=vector(_FINAL_NORM, config.hidden_size),
        head=linear(head_VE),
    )


def _gather(
    read: _Read, parts: SequenceOf[tuple[str, tuple[int, ...]]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Tensors one below the other in one; each is cast as it is copied."""
    num_rows = sum(shape[0] for _, shape in parts)
    fused = torch.empty((num_rows, *parts[0][1][1:]), dtype=dtype, device=device)
    first = 0
    for name, shape in parts:
        fused[first : first + shape[0]].copy_(read(name, shape))
        first += shape[0]
    return fused


#: Tensors of a fused projection and the rows of each.
_Parts = tuple[tuple[str, int], ...]


def _projections(config: DecoderConfig) -> Iterator[tuple[_Parts, int, bool]]:
    """The four projections of a layer: their tensors and rows, their columns, whether they have a bias."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield _split(config.names.qkv, (queries, keys, keys)), config.hidden_size, config.qkv_bias
    yield (("self_attn.o_proj", config.hidden_size),), queries, config.out_bias
    yield _split(config.names.gate_up, (config.inner_size,) * 2), config.hidden_size, config.mlp_bias
    yield (("mlp.down_proj", config.hidden_size),), config.inner_size, config.mlp_bias


def _split(names: tuple[str, ...], num_rows: tuple[int, ...]) -> _Parts:
    """A tensor each, or one for all where the checkpoint is fused already."""
    return ((names[0], sum(num_rows)),) if len(names) == 1 else tuple(zip(names, num_rows, strict=True))


def _norms(config: DecoderConfig) -> Iterator[tuple[str, int]]:
    names = config.names
    for name in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp):
        if name is not None:
            yield name, config.hidden_size
    if config.qk_norm:
        yield "self_attn.q_norm", config.head_dim
        yield "self_attn.k_norm", config.head_dim


def _num_weights(config: DecoderConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def _few(names: SequenceOf[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"
