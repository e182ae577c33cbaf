"""The job file as types: what a job is, which values are allowed, what a missing key means.

Every block refuses keys it does not know. Reading files, overrides and error locations live in
``job_file``; what makes two jobs the same job lives in ``fingerprint``.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchinfer.records import GENERATED_COLUMNS, SamplingParams

#: What fsspec filesystems accept is theirs to define (credentials, endpoints, nested client arguments).
StorageOptions = dict[str, Any]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
#: What a seed is hashed from and stored as.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]

#: Arguments of the chat template that the job sets itself; ``chat_template_kwargs`` may not.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "return_dict"}
    | {"return_tensors", "tokenize", "tokenizer_kwargs"}
)


class Block(BaseModel):
    """Base of every block: unknown keys refused, values fixed once read, no silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


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
    format: Literal["parquet"] = "parquet"
    storage_options: StorageOptions = Field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


class PromptSpec(Block):
    """How a row becomes token ids: exactly one of text, messages, template, token_ids."""

    #: Column with a plain prompt (becomes one user message with ``chat: true``).
    text: str | None = None
    #: Column with a list of {role, content}.
    messages: str | None = None
    #: Sandboxed Jinja over the row's columns; becomes the user message (raw text with ``chat: false``).
    template: str | None = None
    #: Column with token ids; no tokenizer is used.
    token_ids: str | None = None
    #: System message put first, unless the row's messages bring one.
    system: str | None = None
    #: Apply the checkpoint's chat template; null = yes for messages and template, no for text.
    chat: bool | None = None
    #: Passed to the chat template, e.g. {enable_thinking: true}.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    #: Control tokens in a row's own strings: escape = plain text, reject = dead letter, allow = as the tokenizer reads
    #: them; null = escape, but allow where ``text`` without a chat template is the user's own format.
    control_tokens: Literal["escape", "allow", "reject"] | None = None
    #: Struct column whose fields override ``sampling`` for their row; null fields keep the job's value.
    sampling_column: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "PromptSpec":
        given = [name for name in ("text", "messages", "template", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            named = ", ".join(given) if given else "none"
            raise ValueError(f"give exactly one of text, messages, template, token_ids (given: {named})")
        if self.messages is not None and self.chat is False:
            raise ValueError("messages need the chat template; use text or template with chat: false")
        if self.token_ids is not None and (self.chat or self.system is not None or self.control_tokens is not None):
            raise ValueError("token_ids are read as they are; chat, system and control_tokens do not apply")
        if self.system is not None and not self.applies_chat_template:
            raise ValueError("system needs the chat template; set chat: true")
        if self.chat_template_kwargs and not self.applies_chat_template:
            raise ValueError("chat_template_kwargs need the chat template; set chat: true")
        reserved = sorted(RESERVED_TEMPLATE_KWARGS & set(self.chat_template_kwargs))
        if reserved:
            raise ValueError(f"chat_template_kwargs {', '.join(reserved)} are set by the job itself; leave them out")
        return self

    @property
    def applies_chat_template(self) -> bool:
        if self.chat is not None:
            return self.chat
        return self.messages is not None or self.template is not None

    @property
    def control_token_rule(self) -> Literal["escape", "allow", "reject"]:
        """``control_tokens``, or what its null means for this source."""
        if self.control_tokens is not None:
            return self.control_tokens
        frames = self.applies_chat_template or self.template is not None
        return "escape" if frames else "allow"


class SamplingSpec(Block):
    """How completions are drawn; ``prompt.sampling_column`` may override any field per row."""

    max_new_tokens: Positive = 512
    #: End-of-sequence and stop conditions are ignored before this many tokens.
    min_new_tokens: NonNegative = 0
    #: 0 = greedy.
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    #: 0 = off.
    top_k: NonNegative = 0
    #: Keep tokens at least this likely relative to the likeliest.
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    #: Completions per row.
    n: Positive = 1
    seed: Int64 = 0
    #: Strings that end a completion; they are cut from its text.
    stop: list[NonEmpty] = Field(default_factory=list)
    #: Token ids that end a completion, beside the model's own.
    stop_token_ids: list[NonNegative] = Field(default_factory=list)
    #: Generate up to max_new_tokens whatever the model says (for benchmarks).
    ignore_eos: bool = False
    #: null = none, 0 = of the chosen tokens, k = the k best as well.
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _min_below_max(self) -> "SamplingSpec":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self

    def params(self) -> SamplingParams:
        """The same values as the engine's plain dataclass."""
        values = self.model_dump()
        return SamplingParams(**{**values, "stop": tuple(self.stop), "stop_token_ids": tuple(self.stop_token_ids)})


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


class FakeSpec(Block):
    """The fake engine's speed and faults: no model, no torch, tokens that depend on the prompt alone."""

    #: Simulated speed of one replica; null = as fast as it goes.
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    #: Time before the replica is ready.
    start_s: Annotated[float, Field(ge=0)] = 0.0
    #: Probability per step (seeded) that the engine raises, as a driver error would.
    error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: Probability per step (seeded) that the replica's process dies on the spot.
    crash_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    #: A prompt containing this token id kills the replica's process each time it is generated.
    poison_token_id: NonNegative | None = None
    #: Seed of the two rates.
    fault_seed: int = 0


class EngineSpec(Block):
    """Which engine, and its limits. The defaults come from the device."""

    #: auto = continuous where it knows the model and its kernels prove right on the device, else padded.
    kind: Literal["auto", "continuous", "padded", "fake"] = "auto"
    #: Sequences in one batch; null = from the device.
    max_batch_rows: Positive | None = None
    #: Rows times padded length of one batch, the KV cache's size in tokens; null = from the device's memory.
    max_batch_tokens: Positive | None = None
    fake: FakeSpec = Field(default_factory=FakeSpec)


class ClusterSpec(Block):
    """Where replicas run."""

    #: null = a Ray started inside this process; "auto" or "ray://host:port" joins a cluster.
    address: str | None = None
    #: auto = one per GPU of the cluster, one on a CPU-only cluster.
    replicas: Positive | Literal["auto"] = "auto"
    #: Per replica; null = 1 where the cluster has GPUs, else 0.
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    #: Per replica; null = 1 with a GPU, else an equal share of the cores.
    num_cpus: Annotated[float, Field(gt=0)] | None = None


class ExecutionSpec(Block):
    """Units, retries and timing."""

    rows_per_unit: Positive = 1024
    #: Rows and tokens of units in flight are journaled at most this far apart.
    journal_interval_s: Annotated[float, Field(gt=0)] = 30.0
    #: Tries per work unit before it is given up for this run.
    max_attempts: Positive = 3
    #: A replica that cannot start is tried this often before the run ends.
    max_start_attempts: Positive = 3
    #: A replica with units but without a sign of life (a step, a row read or written) for this long is replaced.
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    #: A replica that is not ready after this long is replaced.
    start_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    #: Units each replica holds; at least two, so that the next unit's rows start before the last one's slowest ends.
    units_in_flight: Annotated[int, Field(ge=2)] = 2
    #: A lease without a heartbeat for this long may be taken over.
    lease_timeout_s: Annotated[float, Field(ge=2)] = 60.0


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
