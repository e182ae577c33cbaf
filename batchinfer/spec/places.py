"""Blocks that say what is read and written: model, input, output."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from batchinfer.records import GENERATED_COLUMNS
from batchinfer.spec.block import Block, NonEmpty, Positive, StorageOptions


class ModelSpec(Block):
    """Which weights, and how they are loaded."""

    #: Hub id, local directory, or fsspec URI of a directory.
    path: str = Field(min_length=1)
    #: Hub revision (branch, tag or commit); null = the hub's default branch.
    revision: str | None = None
    #: Never taken from the checkpoint: EXAONE 3.0's config says float32 and would load twice the bytes.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    #: Prompt and completion together; null = the model's own limit.
    max_model_len: Positive | None = None
    #: Where the weights go; auto = cuda where the replica has a GPU.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: For a model directory behind an fsspec URI; never written to the output.
    storage_options: StorageOptions = Field(default_factory=dict)


class InputSpec(Block):
    """Where the rows come from."""

    #: File, directory, glob, or a list of them, local or any fsspec URI.
    path: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    #: auto = by the files' names: .parquet, or .jsonl and .ndjson (also .gz, .zst); any other name is Parquet.
    format: Literal["auto", "parquet", "jsonl"] = "auto"
    storage_options: StorageOptions = Field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


class OutputSpec(Block):
    """Where completions go and which columns they carry."""

    #: Local directory or fsspec URI; holds completions/, errors/ and _job/.
    path: str = Field(min_length=1)
    #: Input columns to pass through; null = all.
    columns: list[NonEmpty] | None = None
    #: Add the generated token ids as a column.
    token_ids: bool = False
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    storage_options: StorageOptions = Field(default_factory=dict)

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> "OutputSpec":
        columns = self.columns or []
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"columns {', '.join(twice)} are named twice; name each column once")
        clash = sorted(set(columns) & set(GENERATED_COLUMNS))
        if clash:
            raise ValueError(
                f"columns {', '.join(clash)} are names the job adds itself; leave them out or rename the input column"
            )
        return self
