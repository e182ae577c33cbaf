"""Which engine a loaded model gets."""

from typing import Literal, Protocol

from transformers import PreTrainedModel

from batchinfer.engine.engine import Decode, Engine
from batchinfer.engine.padded import PaddedEngine

EngineKind = Literal["auto", "padded"]


class ServableModel(Protocol):
    """What an engine needs of a loaded model (``models.loading.LoadedModel`` has it)."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...


def build_engine(
    kind: EngineKind,
    loaded: ServableModel,
    *,
    decode: Decode | None = None,
    max_batch_rows: int | None = None,
    max_batch_tokens: int | None = None,
) -> Engine:
    """The engine of this kind, ready to be driven; ``auto`` is the fastest that supports the model, so far ``padded``.

    ``decode`` is needed by sequences with stop strings only. Limits left out come from the device.
    """
    return PaddedEngine(
        loaded.model,
        eos_token_ids=loaded.eos_token_ids,
        pad_token_id=loaded.pad_token_id,
        max_model_len=loaded.max_model_len,
        decode=decode,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
    )
