"""Rows of a work unit become prompts: text or chat, token ids, sampling; a row that cannot becomes a dead letter."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa
from jinja2 import TemplateSyntaxError

from batchinfer.errors import ModelError, RowRejected
from batchinfer.prompts.columns import NO_CHAT_TEMPLATE, WITHOUT_CHAT_TEMPLATE, check_schema, required_columns
from batchinfer.prompts.sampling import RowSampling
from batchinfer.prompts.template import RowTemplate, short_error
from batchinfer.prompts.values import Message, accepted, cells, each, messages_of, override_of, text_of, token_ids_of
from batchinfer.records import Prompt, RowError, SamplingParams
from batchinfer.spec import PromptSpec, SamplingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptRenderer:
    """Renders and tokenises rows for one job and one model. Threads may share it.

    ``max_model_len`` counts prompt and completion together, in tokens. ``vocab_size`` is the model's number of token
    ids (None = unchecked). Raises ModelError when the job needs a tokenizer or a chat template that the model does
    not have, SpecError for a template or stop condition that cannot work.
    """

    def __init__(
        self,
        prompt: PromptSpec,
        sampling: SamplingSpec,
        tokenizer: "PreTrainedTokenizerBase | None",
        max_model_len: int,
        vocab_size: int | None = None,
    ) -> None:
        if tokenizer is None and prompt.token_ids is None:
            raise ModelError("the model has no tokenizer; add its tokenizer.json, or give token ids (prompt.token_ids)")
        self._prompt = prompt
        self._sampling_spec = sampling
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._template = None if prompt.template is None else RowTemplate(prompt.template)
        self._sampling = RowSampling(sampling, vocab_size, decodes=tokenizer is not None)
        # Ids from the model's own tokenizer are in range, except where the tokenizer is the larger of the two.
        self._trusts_ids = prompt.token_ids is None and tokenizer is not None and len(tokenizer) <= (vocab_size or 0)
        #: The columns that ``render`` reads.
        self.required_columns = required_columns(prompt)
        if prompt.applies_chat_template:
            self._check_chat_template()

    def check_schema(self, schema: pa.Schema, where: str = "the input") -> None:
        """Raise InputError if a required column is missing or has a type that does not fit; see ``columns``."""
        check_schema(self._prompt, self._sampling_spec, schema, where)

    def render(self, rows: pa.Table, row_ids: Sequence[str]) -> list[Prompt | RowError]:
        """One prompt or dead letter per row, in order. ``rows`` holds at least ``required_columns``.

        A prompt whose ``max_new_tokens`` would pass the model's limit gets what still fits. The result of a row does
        not depend on the rows beside it. Dead letters: null_prompt, empty_prompt, bad_text, bad_messages,
        bad_token_ids, bad_sampling, template_error, too_long.
        """
        token_ids = self._token_ids(rows)
        sampling = self._row_sampling(rows)
        prompts: list[Prompt | RowError] = []
        for row_id, ids, params in zip(row_ids, token_ids, sampling, strict=True):
            try:
                prompts.append(self._fit(row_id, accepted(ids), accepted(params)))
            except RowRejected as error:
                prompts.append(RowError(row_id, error.error_type, error.error))
        return prompts

    def _texts(self, rows: pa.Table) -> list[str | RowRejected]:
        """What the tokenizer reads, per row."""
        prompt = self._prompt
        if prompt.messages is not None:
            return each(cells(rows, prompt.messages), lambda value: self._chat(messages_of(value)))
        texts = cells(rows, prompt.text) if prompt.text is not None else self._rendered_templates(rows)
        if prompt.applies_chat_template:
            return each(texts, lambda text: self._chat([{"role": "user", "content": text_of(text)}]))
        return each(texts, text_of)

    def _rendered_templates(self, rows: pa.Table) -> Sequence[object]:
        template = self._template
        assert template is not None
        columns = {name: cells(rows, name) for name in template.columns}

        def render(index: object) -> str:
            assert isinstance(index, int)
            row = {name: values[index] for name, values in columns.items()}
            rejected = next((value for value in row.values() if isinstance(value, RowRejected)), None)
            if rejected is not None:
                raise rejected
            return template.render(row)

        return each(range(rows.num_rows), render)

    def _chat(self, messages: list[Message]) -> str:
        """The checkpoint's chat template over the messages, the system prompt first unless they bring one.

        A last message of the assistant is continued: the text ends in its words, without an end of turn.
        """
        if self._prompt.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._prompt.system}, *messages]
        return text_of(self._apply_chat_template(messages))

    def _apply_chat_template(self, messages: list[Message]) -> object:
        assert self._tokenizer is not None
        continues = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self._prompt.chat_template_kwargs,
            )
        except TemplateSyntaxError as error:
            place = f"line {error.lineno}: {error.message}"
            raise ModelError(f"the model's chat template cannot be read: {place}; correct the model's files") from error
        except Exception as error:  # noqa: BLE001 (a checkpoint's template may raise anything; it costs its row alone)
            if continues and isinstance(error, ValueError):
                # transformers quotes the whole chat in this one.
                reason = "the chat template cannot continue the last message, which is the assistant's"
                raise RowRejected("bad_messages", reason) from None
            raise RowRejected("template_error", short_error(error)) from None

    def _check_chat_template(self) -> None:
        assert self._tokenizer is not None
        if not self._tokenizer.chat_template:
            raise ModelError(NO_CHAT_TEMPLATE)
        try:
            self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the model's chat templates have no default among them; {WITHOUT_CHAT_TEMPLATE}"
            ) from error
        # A template may insist on what only real rows have. That a syntax error is no row's fault shows here at once.
        with suppress(RowRejected):
            self._apply_chat_template([{"role": "user", "content": "Hi"}])

    def _token_ids(self, rows: pa.Table) -> list[list[int] | RowRejected]:
        """One tokenizer call for all rows: it runs in Rust, on several threads, without the GIL.

        A chat template writes its own special tokens; plain text gets those that the tokenizer adds by its own rule.
        """
        if self._prompt.token_ids is not None:
            return each(cells(rows, self._prompt.token_ids), token_ids_of)
        assert self._tokenizer is not None
        texts = self._texts(rows)
        good = [text for text in texts if isinstance(text, str)]
        encoded: list[list[int]] = []
        if good:
            encoded = self._tokenizer(
                good,
                add_special_tokens=not self._prompt.applies_chat_template,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        following = iter(encoded)
        return [text if isinstance(text, RowRejected) else next(following) for text in texts]

    def _row_sampling(self, rows: pa.Table) -> Sequence[SamplingParams | RowRejected]:
        if self._prompt.sampling_column is None:
            return [self._sampling.job_params] * rows.num_rows
        overrides = cells(rows, self._prompt.sampling_column)
        return each(overrides, lambda value: self._sampling.params(override_of(value)))

    def _fit(self, row_id: str, token_ids: list[int], params: SamplingParams) -> Prompt:
        num_tokens = len(token_ids)
        if num_tokens == 0:
            raise RowRejected("empty_prompt", "the prompt has no tokens")
        if not self._trusts_ids and self._vocab_size is not None:
            for extreme in (min(token_ids), max(token_ids)):
                if not 0 <= extreme < self._vocab_size:
                    reason = f"token id {extreme} is outside the model's {self._vocab_size} token ids"
                    raise RowRejected("bad_token_ids", reason)
        room = self._max_model_len - num_tokens
        needed = max(1, params.min_new_tokens)
        if room < needed:
            reason = f"{num_tokens} prompt tokens and {needed} new ones pass the model's limit of {self._max_model_len}"
            raise RowRejected("too_long", reason)
        if params.max_new_tokens > room:
            params = dataclasses.replace(params, max_new_tokens=room)
        return Prompt(row_id, token_ids, params)
