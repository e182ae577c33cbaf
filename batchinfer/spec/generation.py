"""Blocks that say what is generated: prompt and sampling."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from batchinfer.records import SamplingParams
from batchinfer.spec.block import Block, Int64, NonEmpty, NonNegative, Positive

#: Arguments of the chat template that the job sets itself; ``chat_template_kwargs`` may not.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "return_dict"}
    | {"return_tensors", "tokenize", "tokenizer_kwargs"}
)

#: Fields of ``sampling`` that an API request decides, by naming them or by leaving them at the API's default.
OF_THE_REQUEST = frozenset({"temperature", "top_p", "n", "stop", "logprobs", "json_schema", "regex", "choices"})
#: Where a prompt may come from; a job names one of them.
PROMPT_SOURCES = ("text", "messages", "template", "token_ids", "turns", "request")


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
