"""The job file as types: what a job is, which values are allowed, what a missing key means.

Every block refuses keys it does not know. Reading files, overrides and error locations live in
``job_file``; what makes two jobs the same job lives in ``fingerprint``.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from batchinfer.moments import parse_deadline
from batchinfer.quality import QualityKind, Script
from batchinfer.records import GENERATED_COLUMNS, SamplingParams

#: What fsspec filesystems accept is theirs to define (credentials, endpoints, nested client arguments).
StorageOptions = dict[str, Any]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
#: What a seed is hashed from and stored as.
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]

#: Arguments of the chat template that the job sets itself; ``chat_template_kwargs`` may not.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "return_dict"}
    | {"return_tensors", "tokenize", "tokenizer_kwargs"}
)

#: Fields of ``sampling`` that an API request decides, by naming them or by leaving them at the API's default.
OF_THE_REQUEST = frozenset({"temperature", "top_p", "n", "stop", "logprobs", "json_schema", "regex", "choices"})
#: Where a prompt may come from; a job names one of them.
PROMPT_SOURCES = ("text", "messages", "template", "token_ids", "turns", "request")


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
    #: auto = by the files' names: .parquet, or .jsonl and .ndjson (also .gz, .zst); any other name is Parquet.
    format: Literal["auto", "parquet", "jsonl"] = "auto"
    storage_options: StorageOptions = Field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


class PromptSpec(Block):
    """How a row becomes token ids, from exactly one source (``PROMPT_SOURCES``)."""

    #: Column with a plain prompt (becomes one user message with ``chat: true``).
    text: str | None = None
    #: Column with a list of {role, content}.
    messages: str | None = None
    #: Sandboxed Jinja over the row's columns; becomes the user message (raw text with ``chat: false``).
    template: str | None = None
    #: Column with token ids; no tokenizer is used.
    token_ids: str | None = None
    #: Column with a list of user turns: each is answered in order, with all before it in view.
    turns: str | None = None
    #: Column with an OpenAI request body as JSON text: prompt and sampling in one. Columns ``url`` and ``method``
    #: beside it are obeyed. What a body leaves open (max_new_tokens, seed, ...) comes from ``sampling``.
    request: str | None = None
    #: System message put first, unless the row's messages bring one.
    system: str | None = None
    #: Apply the checkpoint's chat template; null = yes for messages, template and request, no for text. With requests,
    #: false = the model has none: /v1/completions alone is served.
    chat: bool | None = None
    #: Passed to the chat template, e.g. {enable_thinking: true}.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    #: Control tokens in a row's own strings: escape = plain text, reject = dead letter, allow = as the tokenizer reads
    #: them; null = escape, but allow where ``text`` without a chat template is the user's own format.
    control_tokens: Literal["escape", "allow", "reject"] | None = None
    #: Struct column whose fields override ``sampling`` for their row; null fields keep the job's value.
    sampling_column: str | None = None
    #: Instead of such a column: Jinja over the row's columns that writes the same fields as a JSON object.
    sampling_template: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "PromptSpec":
        given = [name for name in PROMPT_SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            named = ", ".join(given) if given else "none"
            raise ValueError(f"give exactly one of {', '.join(PROMPT_SOURCES)} (given: {named})")
        if self.messages is not None and self.chat is False:
            raise ValueError("messages need the chat template; use text or template with chat: false")
        if self.turns is not None and self.chat is False:
            raise ValueError("turns need the chat template, which tells them from the answers; leave out chat: false")
        if self.token_ids is not None and (self.chat or self.system is not None or self.control_tokens is not None):
            raise ValueError("token_ids are read as they are; chat, system and control_tokens do not apply")
        if self.system is not None and not self.applies_chat_template:
            raise ValueError("system needs the chat template; set chat: true")
        if self.chat_template_kwargs and not self.applies_chat_template:
            raise ValueError("chat_template_kwargs need the chat template; set chat: true")
        if self.sampling_column is not None and self.sampling_template is not None:
            raise ValueError("sampling_column and sampling_template both say how a row is sampled; give one of them")
        if self.request is not None and (self.sampling_column is not None or self.sampling_template is not None):
            raise ValueError("a request brings its own sampling; sampling_column and sampling_template do not apply")
        reserved = sorted(RESERVED_TEMPLATE_KWARGS & set(self.chat_template_kwargs))
        if reserved:
            raise ValueError(f"chat_template_kwargs {', '.join(reserved)} are set by the job itself; leave them out")
        return self

    @property
    def applies_chat_template(self) -> bool:
        if self.chat is not None:
            return self.chat
        return any(source is not None for source in (self.messages, self.template, self.turns, self.request))

    @property
    def control_token_rule(self) -> Literal["escape", "allow", "reject"]:
        """``control_tokens``, or what its null means for this source."""
        if self.control_tokens is not None:
            return self.control_tokens
        frames = self.applies_chat_template or self.template is not None
        return "escape" if frames else "allow"


def canonical_schema(schema: dict[str, Any] | str) -> str:
    """One JSON text for a schema however it was written. Members keep their order: completions have it too.

    Raises ValueError for what is no JSON object.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, dict):
            raise ValueError("json_schema: a schema is a JSON object, such as {type: object, properties: {...}}")
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema: not JSON: {error}") from None
    except TypeError as error:
        # YAML reads an unquoted 2024-01-01 as a date.
        raise ValueError(f"json_schema: {error}; put quotes around it") from None
    except RecursionError:
        raise ValueError("json_schema: nested too deep") from None


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
    #: Nothing is generated: each of these texts is scored as the prompt's continuation; the likeliest is the completion
    #: and all scores are in the column ``choices``.
    choices: list[NonEmpty] = Field(default_factory=list)
    #: A JSON schema, as a block of keys or as JSON text: completions are JSON of it.
    json_schema: dict[str, Any] | NonEmpty | None = None
    #: A pattern (Rust's regex syntax, without look-around and back-references): completions match it as a whole.
    regex: NonEmpty | None = None

    @model_validator(mode="after")
    def _grammar_decides_the_end(self) -> "SamplingSpec":
        name = "json_schema" if self.json_schema is not None else "regex"
        if self.json_schema is None and self.regex is None:
            return self
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("give json_schema or regex, not both")
        if self.json_schema is not None:
            canonical_schema(self.json_schema)
        if self.choices:
            raise ValueError(f"choices are scored as they are; leave out {name}")
        against = {
            "stop": bool(self.stop),
            "min_new_tokens": self.min_new_tokens > 0,
            "ignore_eos": self.ignore_eos,
        }
        found = [key for key, is_set in against.items() if is_set]
        if found:
            raise ValueError(f"with {name} the grammar says where a completion ends; leave out {', '.join(found)}")
        return self

    @model_validator(mode="after")
    def _choices_stand_alone(self) -> "SamplingSpec":
        if self.choices:
            twice = sorted({choice for choice in self.choices if self.choices.count(choice) > 1})
            if twice:
                raise ValueError(f"choices {', '.join(map(repr, twice))} are there twice; give each once")
            if self.n != 1:
                raise ValueError(
                    f"choices have one score each, however often they are asked for; leave out n: {self.n}"
                )
            if self.stop:
                raise ValueError("choices are scored to their end; leave out stop")
        return self

    @model_validator(mode="after")
    def _min_below_max(self) -> "SamplingSpec":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self

    def params(self) -> SamplingParams:
        """The same values as the engine's plain dataclass."""
        values = self.model_dump()
        return SamplingParams(
            **{
                **values,
                "stop": tuple(self.stop),
                "stop_token_ids": tuple(self.stop_token_ids),
                "choices": tuple(self.choices),
                "json_schema": None if self.json_schema is None else canonical_schema(self.json_schema),
            }
        )


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
    #: The run drains so that it is over by then: a moment with its zone, a time of day ("06:00") or a duration ("8h").
    deadline: str | None = None
    #: All runs of the output together hold GPUs no longer than this; a replica without a GPU counts as one with one.
    max_gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @field_validator("deadline")
    @classmethod
    def _deadline_can_be_read(cls, deadline: str | None) -> str | None:
        if deadline is not None:
            parse_deadline(deadline)
        return deadline


class QualitySpec(Block):
    """What completions are watched for, and from which share on the run is stopped. Shares are of completions."""

    #: Script, or list of scripts, that most letters of a completion should be of; null = any.
    script: Script | Annotated[list[Script], Field(min_length=1)] | None = None
    #: null = only counted. Empty: nothing but white space.
    max_empty: Share | None = None
    #: Ended by max_new_tokens or the model's length.
    max_truncated: Share | None = None
    #: Ends in a loop.
    max_repeating: Share | None = None
    #: Most of its letters are of other scripts than ``script``.
    max_wrong_script: Share | None = None
    #: Rows that must have been committed before a share means anything; later on the last ten times as many count.
    min_rows: Positive = 100

    @model_validator(mode="after")
    def _script_is_given(self) -> "QualitySpec":
        if self.max_wrong_script is not None and self.script is None:
            raise ValueError("max_wrong_script needs to know which script is right; give script, for example hangul")
        return self

    @property
    def scripts(self) -> tuple[Script, ...]:
        if self.script is None:
            return ()
        return (self.script,) if isinstance(self.script, str) else tuple(self.script)

    @property
    def limits(self) -> dict[QualityKind, float]:
        """The shares that stop a run, by what they are shares of."""
        limits: dict[QualityKind, float | None] = {
            "empty": self.max_empty,
            "truncated": self.max_truncated,
            "repeating": self.max_repeating,
            "wrong_script": self.max_wrong_script,
        }
        return {kind: limit for kind, limit in limits.items() if limit is not None}


class TelemetrySpec(Block):
    """What a run tells of itself beside its output."""

    #: Counters and gauges to Ray, whose agents export them for Prometheus.
    metrics: bool = True
    #: Spans by OpenTelemetry to where the OTEL_* variables say; needs the extra ``otel``.
    traces: bool = False


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
