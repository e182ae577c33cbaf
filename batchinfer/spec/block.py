"""What all blocks of a job file have in common: strictness, and the types of their values."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

#: What fsspec filesystems accept is theirs to define (credentials, endpoints, nested client arguments).
StorageOptions = dict[str, Any]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
#: What a seed is hashed from and stored as.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Block(BaseModel):
    """Base of every block: unknown keys refused, values fixed once read, no silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
