"""From a model directory to a model on a device: every weight from the files, none made up, no foreign code run."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from batchinfer.errors import ModelError
from batchinfer.models import files
from batchinfer.models.architecture import check_architecture
from batchinfer.models.exaone import EXAONE3, KEY_MAPPING, llama_config_values
from batchinfer.models.files import check_model_files, read_config, read_generation_config, weight_files

__all__ = ["DTYPES", "LoadedModel", "ModelFacts", "check_device", "load_model", "native_config", "read_facts"]

#: ``model.dtype`` -> torch's.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NUM_NAMED = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate (evaluation mode, on its device) and what an engine has to know of it.

    ``eos_token_ids`` all end a sequence; empty where the checkpoint names none. ``pad_token_id`` is any valid
    id: padding is masked. ``vocab_size`` is the number of embedding rows: token ids are below it.
    """

    model: PreTrainedModel
    model_type: str
    architecture: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint says of its model before a weight is read.

    ``config`` is transformers' (EXAONE 3.x comes as the ``LlamaConfig`` it is), ``key_mapping`` renames the tensors
    in ``weight_files`` to the names transformers gives them. The ids are those of :class:`LoadedModel`.
    """

    config: PreTrainedConfig
    weight_files: tuple[Path, ...]
    key_mapping: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    max_model_len: int


def read_facts(directory: Path, *, max_model_len: int | None = None) -> ModelFacts:
    """Check a directory as :func:`load_model` would and read its configuration; no weights, no device.

    Raises ModelError when the directory or the family does not do.
    """
    check_model_files(directory, needs_tokenizer=False)
    config = read_config(directory)
    check_architecture(config)
    return ModelFacts(
        config=native_config(directory, config),
        weight_files=weight_files(directory),
        key_mapping=KEY_MAPPING if config["model_type"] == EXAONE3 else {},
        eos_token_ids=_eos_token_ids(directory, config),
        max_model_len=files.max_model_len(config, max_model_len),
    )


def check_device(device: str, dtype: str) -> None:
    """Raises ModelError for a dtype we do not load or a GPU that is not there."""
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device {device}: torch sees no GPU here; set model.device=cpu or check the driver")


def load_model(directory: Path, *, dtype: str, device: str, max_model_len: int | None = None) -> LoadedModel:
    """Load a directory in hub layout in ``dtype`` ("bfloat16", "float16", "float32") onto ``device`` ("cpu", "cuda").

    The checkpoint's own ``torch_dtype`` is ignored: EXAONE 3.0 says float32. Weights are cast as they are read
    and the model is never cast as a whole: that would round the rotary frequencies, which stay float32. Raises
    ModelError when the directory, the family, the device or its memory does not do, and whenever a weight is
    missing, left over or of another shape, which transformers only reports.
    """
    check_device(device, dtype)
    facts = read_facts(directory, max_model_len=max_model_len)
    config = read_config(directory)
    try:
        with _quiet_transformers():
            model, report = _from_pretrained(directory, facts, DTYPES[dtype])
    except Exception as error:
        raise _cannot_load(directory, error) from error
    _refuse_unless_complete(directory, report)
    model.requires_grad_(False)
    _move(model, device)
    embedding: Any = model.get_input_embeddings()
    vocab_size = int(embedding.weight.shape[0])
    _log.info("loaded %s (%s) in %s on %s", directory, type(model).__name__, dtype, device)
    return LoadedModel(
        model=model,
        model_type=str(config["model_type"]),
        architecture=type(model).__name__,
        eos_token_ids=facts.eos_token_ids,
        pad_token_id=_pad_token_id(directory, config, facts.eos_token_ids, vocab_size),
        vocab_size=vocab_size,
        max_model_len=facts.max_model_len,
    )


def native_config(directory: Path, config: Mapping[str, object]) -> PreTrainedConfig:
    """transformers' configuration of the model; raises ModelError where transformers cannot read it."""
    if config["model_type"] == EXAONE3:
        llama_values: dict[str, Any] = llama_config_values(config)
        return LlamaConfig(**llama_values)
    try:
        native: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _cannot_load(directory, error) from error
    return native


def _from_pretrained(
    directory: Path, facts: ModelFacts, dtype: torch.dtype
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model in memory, and transformers' report: missing_keys, unexpected_keys, mismatched_keys, error_msgs."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(facts.config)]
    loaded: Any = model_class.from_pretrained(
        directory,
        config=facts.config,
        key_mapping=dict(facts.key_mapping) or None,
        # Families whose attention is more than softmax(QK)V, Gemma 2's capped scores for one, have no sdpa form.
        attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        # Reported with the rest instead of raised one by one; the report is refused below.
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    return model, report


def _cannot_load(directory: Path, error: Exception) -> ModelError:
    """Our error for theirs. On configurations and weights they cannot make sense of, transformers, huggingface_hub
    and safetensors raise anything from KeyError to classes of their own with no common base.
    """
    return ModelError(
        f"{directory}: transformers cannot load the model ({type(error).__name__}: {_one_line(error)}); check "
        "that config.json belongs to these weights and that transformers is recent enough for the family"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars in a replica's log, and no load report beside our own error."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _refuse_unless_complete(directory: Path, report: Mapping[str, Any]) -> None:
    found = [
        f"{len(report[key])} {kind}: {_few(report[key])}"
        for key, kind in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "failed"),
        )
        if report[key]
    ]
    if found:
        raise ModelError(
            f"{directory}: the weights do not fit config.json: {'; '.join(found)}; transformers would fill gaps "
            "with random numbers. Use a complete checkpoint with its own config.json"
        )


def _move(model: PreTrainedModel, device: str) -> None:
    module: torch.nn.Module = model
    try:
        module.to(torch.device(device))
    except torch.OutOfMemoryError as error:
        size_gb = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e9
        raise ModelError(
            f"model.device {device}: the weights take {size_gb:.1f} GB and do not fit its memory "
            f"({_one_line(error)}); use a smaller model or a larger GPU"
        ) from error


def _eos_token_ids(directory: Path, config: Mapping[str, object]) -> tuple[int, ...]:
    """generation_config.json's, where it names any: it lists every end of turn, config.json often just one."""
    for source in (read_generation_config(directory), config):
        given = source.get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        named = tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))
        if named:
            return named
    return ()


def _pad_token_id(directory: Path, config: Mapping[str, object], eos_token_ids: Iterable[int], vocab_size: int) -> int:
    """The first valid id of: generation_config.json's, config.json's, an end-of-sequence id, 0."""
    named = [source.get("pad_token_id") for source in (read_generation_config(directory), config)]
    candidates = [*named, *eos_token_ids, 0]
    return next(token_id for token_id in candidates if isinstance(token_id, int) and 0 <= token_id < vocab_size)


def _few(names: Iterable[object]) -> str:
    ordered = sorted(str(name) for name in names)
    shown = ", ".join(ordered[:_NUM_NAMED])
    return shown if len(ordered) <= _NUM_NAMED else f"{shown} and {len(ordered) - _NUM_NAMED} more"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
