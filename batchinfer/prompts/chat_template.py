"""A checkpoint's chat template: messages become the text the model was trained on.

It renders what transformers' ``apply_chat_template`` renders (a test holds the two together), in our own sandbox: a
template comes with the checkpoint, and transformers puts no bound on what it may cost.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from batchinfer.errors import ModelError, RowRejected
from batchinfer.prompts.columns import NO_CHAT_TEMPLATE, WITHOUT_CHAT_TEMPLATE
from batchinfer.prompts.sandbox import BoundedEnvironment, short_error
from batchinfer.prompts.values import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate"]

#: Marks where the words of a message end that the model is to continue; transformers' own.
_END_OF_WORDS = "CONTINUE_FINAL_MESSAGE_TAG "
#: Names of a message's reasoning; templates read the first, gpt-oss's the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class _GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's words for training, and nothing else."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body alone, in a scope of its own."""
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(lineno)


class ChatTemplate:
    """The chat template of a tokenizer. Threads may share it.

    ``variables`` (``chat_template_kwargs`` of the job) reach the template beside the messages. Raises ModelError for
    no template, several without a default, or one that cannot be compiled.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]) -> None:
        if not tokenizer.chat_template:
            raise ModelError(NO_CHAT_TEMPLATE)
        try:
            #: As the checkpoint has it.
            self.source: str = tokenizer.get_chat_template(tools=variables.get("tools"))
        except ValueError as error:
            raise ModelError(
                f"the model's chat templates have no default among them; {WITHOUT_CHAT_TEMPLATE}"
            ) from error
        self._environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        self._variables = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **_plain_dict(variables)}
        #: Variables that a row must not set.
        self._reserved = frozenset({"tools", "documents", *tokenizer.special_tokens_map})
        try:
            self._template, _ = self._environment.bounded(self.source)
        except TemplateSyntaxError as error:
            place = f"line {error.lineno}: {error.message}"
            raise ModelError(f"the model's chat template cannot be read: {place}; correct the model's files") from error
        except SecurityError as error:
            raise ModelError(f"the model's chat template cannot be used: {error}; correct the model's files") from error

    def render(self, messages: list[Message], variables: Mapping[str, object] | None = None) -> str:
        """The text up to where the model begins. ``variables`` are the row's own, over the job's.

        A last message of the assistant is continued: the text ends in its words, without an end of turn. Raises
        RowRejected: template_error, too_long, bad_messages (nothing to continue), unsupported_field (a variable that
        is not the row's to set).
        """
        reserved = sorted(self._reserved & (variables or {}).keys())
        if reserved:
            raise RowRejected("unsupported_field", f"chat_template_kwargs: {reserved[0]} is not the request's to set")
        chat = [_with_reasoning(_plain_dict(message)) for message in messages]
        continues = chat[-1]["role"] == "assistant"
        words = chat[-1].get("content")
        if continues:
            if not isinstance(words, str) or "content" not in self.source:
                raise _cannot_continue()
            chat[-1]["content"] = words + _END_OF_WORDS
        try:
            text = self._environment.render(
                self._template,
                {**self._variables, **(variables or {}), "messages": chat, "add_generation_prompt": not continues},
            )
        except RowRejected:
            raise
        except Exception as error:  # noqa: BLE001 (a checkpoint's template may raise anything)
            raise RowRejected("template_error", short_error(error)) from None
        return _up_to_the_words(text, words) if continues and isinstance(words, str) else text


def _up_to_the_words(text: str, words: str) -> str:
    end = text.rfind(_END_OF_WORDS.strip())
    if end < 0 or words.strip() not in text:
        raise _cannot_continue()
    # A template that trims the message has taken the mark's blank as well; then the words end without theirs.
    return text[:end] if text.startswith(_END_OF_WORDS, end) else text[:end].rstrip()


def _cannot_continue() -> RowRejected:
    return RowRejected("bad_messages", "the chat template cannot continue the last message, which is the assistant's")


def _with_reasoning(message: Message) -> Message:
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> object:
    """The value in JSON's types alone: of other objects a template sees no method, only the name of their type."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
