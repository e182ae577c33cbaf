"""The job file as types: what a job is, which values are allowed, what a missing key means.

Every block refuses keys it does not know. Reading files, overrides and error locations live in
``job_file``; what makes two jobs the same job lives in ``fingerprint``.
"""

from pydantic import Field, model_validator

from batchinfer.spec.block import Block
from batchinfer.spec.generation import (
    OF_THE_REQUEST,
    PROMPT_SOURCES,
    RESERVED_TEMPLATE_KWARGS,
    PromptSpec,
    SamplingSpec,
    canonical_schema,
)
from batchinfer.spec.places import InputSpec, ModelSpec, OutputSpec
from batchinfer.spec.running import (
    ClusterSpec,
    EngineSpec,
    ExecutionSpec,
    FakeSpec,
    QualitySpec,
    TelemetrySpec,
)

__all__ = [
    "OF_THE_REQUEST",
    "PROMPT_SOURCES",
    "RESERVED_TEMPLATE_KWARGS",
    "Block",
    "ClusterSpec",
    "EngineSpec",
    "ExecutionSpec",
    "FakeSpec",
    "InputSpec",
    "JobSpec",
    "ModelSpec",
    "OutputSpec",
    "PromptSpec",
    "QualitySpec",
    "SamplingSpec",
    "TelemetrySpec",
    "canonical_schema",
]


class JobSpec(Block):
    """One job: everything that `run` needs."""

    name: str = Field(default="job", min_length=1)
    model: ModelSpec
    input: InputSpec
    prompt: PromptSpec
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)
    output: OutputSpec
    engine: EngineSpec = Field(default_factory=EngineSpec)
    cluster: ClusterSpec = Field(default_factory=ClusterSpec)
    execution: ExecutionSpec = Field(default_factory=ExecutionSpec)
    quality: QualitySpec = Field(default_factory=QualitySpec)
    telemetry: TelemetrySpec = Field(default_factory=TelemetrySpec)

    @model_validator(mode="after")
    def _turns_are_answered(self) -> "JobSpec":
        if self.prompt.turns is not None and self.sampling.choices:
            raise ValueError("sampling.choices are scored for one prompt; with prompt.turns every turn is answered")
        return self

    @model_validator(mode="after")
    def _requests_bring_their_sampling(self) -> "JobSpec":
        named = sorted(OF_THE_REQUEST & self.sampling.model_fields_set)
        if self.prompt.request is not None and named:
            raise ValueError(
                f"sampling {', '.join(named)}: with prompt.request each request says this itself, or means the API's "
                "own default; leave it out"
            )
        return self
