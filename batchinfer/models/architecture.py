"""Which families the installed transformers can run without code from the checkpoint."""

from collections.abc import Mapping

from batchinfer.errors import ModelError
from batchinfer.models.exaone import EXAONE3
from batchinfer.models.files import model_type

__all__ = ["check_architecture"]


def check_architecture(config: Mapping[str, object]) -> None:
    """Raise ModelError unless transformers itself has the causal language model that ``config.json`` names.

    Called before any ``Auto`` class sees the checkpoint: with ``auto_map`` in its configuration those ask on
    the terminal whether to run the checkpoint's own code. Imports transformers (seconds), and torch with it.
    """
    family = model_type(config)
    if family == EXAONE3:
        return
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if family in CONFIG_MAPPING:
        raise ModelError(f"config.json: model_type {family} is not a causal language model; choose one that is")
    own_code = " and its own code (auto_map) is never run" if config.get("auto_map") else ""
    raise ModelError(
        f"config.json: transformers {__version__} does not know model_type {family}{own_code}; use a newer "
        "transformers, or a version of the checkpoint converted to a family it knows"
    )
