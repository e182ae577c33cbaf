"""From a model directory to the engine that runs it: the fast one where it supports the model, else the general one."""

import importlib.util
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import DecoderConfig, decoder_config, supported
from batchinfer.engine.decoder_weights import load_weights
from batchinfer.engine.engine import Decode, LoadedEngine
from batchinfer.engine.grammar import Grammars
from batchinfer.engine.graphs import GraphedDecoder, cuda_recorder
from batchinfer.engine.ops import Ops
from batchinfer.engine.padded import PaddedEngine
from batchinfer.engine.reserve import reserved_bytes, step_size
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.torch_ops import TorchOps
from batchinfer.engine.warm_up import MAX_DISTANCE, compile_kernels, warm_up
from batchinfer.errors import ModelError
from batchinfer.models.loading import DTYPES, ModelFacts, check_device, load_model, read_facts

logger = logging.getLogger(__name__)

EngineKind = Literal["auto", "continuous", "padded"]


def build_engine(
    kind: EngineKind,
    directory: Path,
    *,
    dtype: str,
    device: str,
    max_model_len: int | None = None,
    decode: Decode | None = None,
    tokenizer_json: Callable[[], str] | None = None,
    max_batch_rows: int | None = None,
    max_batch_tokens: int | None = None,
) -> LoadedEngine:
    """Load the model in ``directory`` (hub layout) onto ``device`` and put an engine of this kind around it.

    ``auto`` is ``continuous`` where that supports the model and its kernels prove right on the device, else
    ``padded``, and says in the log why. ``decode`` is needed by sequences with stop strings only, ``tokenizer_json``
    (the text of a tokenizer.json) by those with a schema or pattern.
    ``max_batch_tokens`` is the size of the KV cache in tokens. Limits left out come from the device. Raises
    ModelError when directory, family, device or memory do not do, and where ``continuous`` is asked for and cannot be.
    """
    check_device(device, dtype)
    if kind != "padded":
        facts = read_facts(directory, max_model_len=max_model_len)
        reason = supported(facts.config) or _lacking(torch.device(device))
        if reason is None:
            try:
                return _continuous(facts, dtype, device, decode, tokenizer_json, max_batch_rows, max_batch_tokens)
            except _KernelsWrong as error:
                # Only the words are kept: the traceback holds the weights.
                reason = str(error)
        if kind == "continuous":
            raise ModelError(f"{directory}: {reason}; use engine.kind=padded")
        logger.warning("the padded engine runs this model: %s", reason)
    loaded = load_model(directory, dtype=dtype, device=device, max_model_len=max_model_len)
    grammars = _grammars(tokenizer_json, loaded.eos_token_ids, loaded.model.device.type)
    engine = PaddedEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        pad_token_id=loaded.pad_token_id,
        max_model_len=loaded.max_model_len,
        decode=decode,
        grammars=grammars,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
    )
    return LoadedEngine(
        engine, "padded", device, loaded.eos_token_ids, loaded.vocab_size, loaded.max_model_len, grammars
    )


def _grammars(
    tokenizer_json: Callable[[], str] | None, eos_token_ids: tuple[int, ...], device_type: str
) -> Grammars | None:
    if tokenizer_json is None:
        return None
    return Grammars(tokenizer_json, eos_token_ids, for_gpu=device_type == "cuda")


class _KernelsWrong(Exception):
    """The kernels do not compute on this device what plain torch does."""


def check_kernels(decoder: Decoder, plain: Decoder, max_model_len: int) -> None:
    """Compile the kernels and hold them against plain torch on the decoder's device, a few seconds before any row.

    Raises _KernelsWrong when they differ by more than rounding explains.
    """
    distance = warm_up(decoder, plain, max_model_len)
    if not distance <= MAX_DISTANCE:
        raise _KernelsWrong(
            f"on {decoder.device} its kernels' logits are {distance:.2g} away from plain torch's, "
            f"where rounding explains {MAX_DISTANCE}"
        )
    logger.info("kernels are right on %s: logits within %.2g of plain torch's", decoder.device, distance)


def _with_its_kernels(decoder: Decoder, plain: Decoder) -> Decoder:
    """The CPU's decoder once its kernels are compiled; its plain twin where their cache cannot be read or written."""
    started_s = time.monotonic()
    try:
        compile_kernels(decoder)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        # A full disk, or a file that a lost machine left torn: numba trusts what it finds.
        logger.warning(
            "plain torch computes what lies between the matrix products, more slowly: numba's cache of its kernels "
            "fails (%s: %s); delete it, or name another folder in NUMBA_CACHE_DIR",
            type(error).__name__,
            error,
        )
        return plain
    logger.info("kernels are ready after %.1f s", time.monotonic() - started_s)
    return decoder


def _lacking(device: torch.device) -> str | None:
    """What the device's kernels need and this installation lacks."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "its kernels need triton, which is not installed"
    return None


def _continuous(
    facts: ModelFacts,
    dtype_name: str,
    device_name: str,
    decode: Decode | None,
    tokenizer_json: Callable[[], str] | None,
    max_rows: int | None,
    max_places: int | None,
) -> LoadedEngine:
    config, dtype, device = decoder_config(facts.config), DTYPES[dtype_name], torch.device(device_name)
    weights = load_weights(config, facts.weight_files, dtype=dtype, device=device, key_mapping=facts.key_mapping)
    decoder = Decoder(config, weights, device_ops(device, dtype), facts.max_model_len)
    plain = Decoder(config, weights, TorchOps(), facts.max_model_len)
    if device.type == "cuda":
        check_kernels(decoder, plain, facts.max_model_len)
    else:
        decoder = _with_its_kernels(decoder, plain)
    limits = continuous_limits(config, dtype, device, facts.max_model_len, max_rows, max_places)
    # One place more than the scheduler knows of: padding rows of graphs write there.
    kv = kv_cache.allocate(config, limits.num_places + 1, dtype, device)
    grammars = _grammars(tokenizer_json, facts.eos_token_ids, device.type)
    engine = ContinuousEngine(
        GraphedDecoder(decoder, kv, limits.max_rows, cuda_recorder(device)) if device.type == "cuda" else decoder,
        kv,
        limits,
        eos_token_ids=facts.eos_token_ids,
        max_model_len=facts.max_model_len,
        decode=decode,
        grammars=grammars,
    )
    return LoadedEngine(
        engine, "continuous", device_name, facts.eos_token_ids, config.vocab_size, facts.max_model_len, grammars
    )


def continuous_limits(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    max_rows: int | None = None,
    max_places: int | None = None,
) -> Limits:
    """What the device can hold once the weights are loaded; ``max_rows`` and ``max_places`` override.

    Raises ModelError where not even one sequence of ``max_model_len`` tokens fits.
    """
    rows, step_tokens = step_size(device.type, max_rows)
    places = max_places
    if places is None:
        reserved = reserved_bytes(config, dtype, device.type, max_rows)
        fitting = kv_cache.num_places(config, dtype, device, reserved_bytes=reserved, min_places=max_model_len)
        # More than every row at its longest can never be used.
        places = min(fitting, rows * max_model_len)
    return Limits(num_places=places, max_rows=rows, max_step_tokens=step_tokens)


def device_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest edition of the decoder's functions for a device and a model's dtype."""
    if device.type == "cuda":
        # Imports triton, which a machine without a GPU need not have.
        from batchinfer.engine.triton_ops import TritonOps

        return TritonOps.of(device)
    if dtype not in (torch.float32, torch.bfloat16):
        return TorchOps()
    try:
        # Imports numba, which may be missing, or refuse a numpy newer than itself.
        from batchinfer.engine.cpu_ops import CpuOps
    except ImportError as error:
        logger.warning("plain torch computes what lies between the matrix products, more slowly: %s", error)
        return TorchOps()
    return CpuOps()
