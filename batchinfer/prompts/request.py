"""``prompt.request``: a body of the OpenAI API (one line of a batch file) becomes a prompt, sampling and nothing else.

What the API defines and this engine does not do is refused row by row, never passed over: a dead letter
``unsupported_field`` names the field. Left out on purpose are fields that change no token (``user``, ``metadata``,
``store``, ``service_tier`` and the prompt cache's), and such a field at the value that means "not used".

Beyond the API, as vLLM's server takes them: ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``,
``stop_token_ids``, ``ignore_eos``, ``chat_template_kwargs``, and ``reasoning_content`` in a message.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from batchinfer.errors import RowRejected
from batchinfer.prompts.sandbox import MAX_PROMPT_CHARS
from batchinfer.prompts.values import Message
from batchinfer.spec import RESERVED_TEMPLATE_KWARGS

__all__ = ["CHAT_URL", "COMPLETIONS_URL", "METHOD_COLUMN", "URL_COLUMN", "Request", "request_of"]

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
#: Columns of a batch file beside the body; looked at where the input has them.
URL_COLUMN, METHOD_COLUMN = "url", "method"

_UNSUPPORTED = "unsupported_field"
_SHOWN_CHARS = 200
#: The API's own default for /v1/completions; for chat it is the model's limit, which the job's setting stands in for.
_COMPLETIONS_MAX_TOKENS = 16
#: Fields that change no token.
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
)
#: Fields that are not supported, with the values that mean they are not used.
_UNUSED: Mapping[str, tuple[object, ...]] = {
    "stream": (None, False),
    "stream_options": (None,),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}
_UNUSED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **_UNUSED,
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
}
_UNUSED_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **_UNUSED,
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}
#: As messages of the assistant carry them that came out of the API.
_UNUSED_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "audio": (None,),
    "refusal": (None,),
    "annotations": (None, []),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a body asks for: a chat, or a text or token ids to continue. ``sampling`` overrides the job's; None is what
    the API leaves to the server, and so to the job."""

    sampling: Mapping[str, object]
    messages: list[Message] | None = None
    text: str | None = None
    token_ids: list[int] | None = None
    #: For the chat template, over the job's own; flags and numbers alone.
    template_kwargs: Mapping[str, bool | int | float | None] = field(default_factory=dict)


def request_of(body: object, url: object = None, method: object = None) -> Request:
    """One line of a batch. ``body`` is JSON text, or a struct as Arrow gives it; without a ``url`` the body tells.

    Raises RowRejected: null_prompt, bad_request (not JSON, or a field of the wrong type), too_long,
    unsupported_field (unknown, or known and not done here).
    """
    if method is not None and method != "POST":
        raise RowRejected("bad_request", f"method is {_shown(method)}, expected 'POST'")
    if url is not None and url not in (CHAT_URL, COMPLETIONS_URL):
        raise RowRejected(_UNSUPPORTED, f"url: {_shown(url)} is not served; {CHAT_URL} and {COMPLETIONS_URL} are")
    values = _body_values(body)
    is_chat = url == CHAT_URL if url is not None else "messages" in values
    try:
        return (_ChatBody if is_chat else _CompletionsBody).model_validate(values).request()
    except ValidationError as error:
        raise _rejected(error) from None


def _body_values(body: object) -> dict[str, Any]:
    if body is None:
        raise RowRejected("null_prompt", "the request is null")
    if isinstance(body, str):
        # Escaped, a character takes up to twelve of the text's.
        if len(body) > 12 * MAX_PROMPT_CHARS:
            raise RowRejected("too_long", f"the request has {len(body):,} characters, above {12 * MAX_PROMPT_CHARS:,}")
        try:
            # Unlike the json module it refuses lone surrogates, which no tokenizer takes, and bounds the nesting.
            body = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RowRejected("bad_request", f"the request is not JSON: {_cut(str(error))}") from None
    elif isinstance(body, dict):
        body = _without_nulls(body)
    if not isinstance(body, dict):
        raise RowRejected("bad_request", f"the request is no JSON object but {_shown(body)}")
    return body


def _without_nulls(value: object) -> object:
    """A struct has all the fields that any of its column's rows has: null where this row has none."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# What bodies look like -----------------------------------------------------------------------------------------------


class _Part(BaseModel):
    """Base of the objects in a body: unknown fields refused, unused ones dropped, no silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    unused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value not in cls.unused.get(name, ())}


def _content(value: object) -> object:
    """Text, or parts of text; several are joined by line ends, as vLLM's server does."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                _UNSUPPORTED, "a part of type {kind} is not supported, only text is", {"kind": kind}
            )
        texts.append(part.get("text"))
        if not isinstance(texts[-1], str):
            raise PydanticCustomError("bad_part", "a part of type text has no text")
    return "\n".join(texts)


def _role(value: object) -> object:
    if value in ("tool", "function"):
        raise PydanticCustomError(_UNSUPPORTED, "the role {role} is not supported", {"role": value})
    # The API's newer name; chat templates know the older one.
    return "system" if value == "developer" else value


class _Message(_Part):
    unused = _UNUSED_IN_MESSAGE

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None
    reasoning_content: str | None = None


def _stop(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Body(_Part):
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}

    def sampling(self) -> dict[str, object]:
        """Nulls are what the API leaves to the server: there the job's own ``sampling`` holds."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "n": 1 if self.n is None else self.n,
            "stop": self.stop or [],
            "seed": self.seed,
            "top_k": None if self.top_k is None else max(self.top_k, 0),  # vLLM writes -1 for "off"
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
        }


class _JsonSchema(_Part):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    #: Under the API's name, which pydantic's own methods would hide.
    json_schema: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {"json_schema" if name == "schema" else name: value for name, value in values.items()}


class _ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def grammar(self) -> str | None:
        """The JSON schema that the answer has to fit, as text; None = any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise PydanticCustomError("bad_format", "response_format of type json_schema has no json_schema")
        return json.dumps(self.json_schema.json_schema, ensure_ascii=False)


def _template_kwargs(value: object) -> object:
    """Flags and numbers: a string of the row's would stand in the prompt unescaped."""
    for name, item in value.items() if isinstance(value, dict) else ():
        if name in RESERVED_TEMPLATE_KWARGS or not (item is None or isinstance(item, bool | int | float)):
            raise PydanticCustomError(
                _UNSUPPORTED, "{name} is not supported; flags and numbers for the template are", {"name": name}
            )
    return value


class _ChatBody(_Body):
    unused = _UNUSED_IN_CHAT

    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: _ResponseFormat | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | None] | None, BeforeValidator(_template_kwargs)] = (
        None
    )

    @model_validator(mode="after")
    def _agrees(self) -> "_ChatBody":
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise PydanticCustomError("two_limits", "max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "top_logprobs needs logprobs: true")
        if self.response_format is not None:
            self.response_format.grammar()
        return self

    def request(self) -> Request:
        sampling = self.sampling()
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        sampling |= {
            "max_new_tokens": limit,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "json_schema": None if self.response_format is None else self.response_format.grammar(),
        }
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        return Request(sampling, messages, template_kwargs=self.chat_template_kwargs or {})


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return value
        if any(isinstance(item, str | list) for item in value):
            raise PydanticCustomError(_UNSUPPORTED, "a list of prompts is not supported; give each its own line")
    raise PydanticCustomError("bad_prompt", "expected text or token ids")


class _CompletionsBody(_Body):
    unused = _UNUSED_IN_COMPLETIONS

    prompt: Annotated[str | list[int], PlainValidator(_prompt)]
    logprobs: int | None = None

    def request(self) -> Request:
        sampling = self.sampling()
        limit = _COMPLETIONS_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        sampling |= {"max_new_tokens": limit, "logprobs": self.logprobs}
        if isinstance(self.prompt, str):
            return Request(sampling, text=self.prompt)
        return Request(sampling, token_ids=self.prompt)


# What is wrong with one ----------------------------------------------------------------------------------------------


def _rejected(error: ValidationError) -> RowRejected:
    """The first field that is not supported, or else the first that is wrong."""
    problems = error.errors(include_url=False, include_input=False)
    unsupported = next((it for it in problems if it["type"] in ("extra_forbidden", _UNSUPPORTED)), None)
    if unsupported is None:
        return RowRejected("bad_request", _cut(f"{_place(problems[0])}{problems[0]['msg']}"))
    if unsupported["type"] == _UNSUPPORTED:
        return RowRejected(_UNSUPPORTED, _cut(f"{_place(unsupported)}{unsupported['msg']}"))
    name = str(unsupported["loc"][-1])
    known = {**_UNUSED_IN_CHAT, **_UNUSED_IN_COMPLETIONS, **_UNUSED_IN_MESSAGE}
    why = "not supported" if name in known else "not a field that this engine knows"
    return RowRejected(_UNSUPPORTED, _cut(f"{_place(unsupported)}{why}"))


def _place(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"]) + ": " if problem["loc"] else ""


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _shown(value: object) -> str:
    return _cut(repr(value))
