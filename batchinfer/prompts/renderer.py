"""Rows of a work unit become prompts: text or chat, token ids, sampling; a row that cannot becomes a dead letter."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa

from batchinfer.errors import ModelError, RowRejected
from batchinfer.prompts.chat_template import ChatTemplate
from batchinfer.prompts.columns import check_schema, required_columns
from batchinfer.prompts.guard import PromptGuard, RowText
from batchinfer.prompts.sampling import RowSampling
from batchinfer.prompts.template import RowTemplate
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
        self._chat_template: ChatTemplate | None = None
        if tokenizer is not None and prompt.applies_chat_template:
            self._chat_template = ChatTemplate(tokenizer, prompt.chat_template_kwargs)
        if tokenizer is not None and prompt.token_ids is None:
            self._guard = PromptGuard(tokenizer, prompt.control_token_rule, self._framing())
        self._sampling = RowSampling(sampling, vocab_size, decodes=tokenizer is not None)
        # Ids from the model's own tokenizer are in range, except where the tokenizer is the larger of the two.
        self._trusts_ids = prompt.token_ids is None and tokenizer is not None and len(tokenizer) <= (vocab_size or 0)
        #: The columns that ``render`` reads.
        self.required_columns = required_columns(prompt)

    def check_schema(self, schema: pa.Schema, where: str = "the input") -> None:
        """Raise InputError if a required column is missing or has a type that does not fit; see ``columns``."""
        check_schema(self._prompt, self._sampling_spec, schema, where)

    def render(self, rows: pa.Table, row_ids: Sequence[str]) -> list[Prompt | RowError]:
        """One prompt or dead letter per row, in order. ``rows`` holds at least ``required_columns``.

        A prompt whose ``max_new_tokens`` would pass the model's limit gets what still fits. The result of a row does
        not depend on the rows beside it. Dead letters: null_prompt, empty_prompt, bad_text, bad_messages,
        bad_token_ids, bad_sampling, control_tokens, template_error, too_long.
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

    def _texts(self, rows: pa.Table) -> list[RowText | RowRejected]:
        """What the tokenizer reads, per row."""
        prompt, guard = self._prompt, self._guard
        if prompt.messages is not None:
            chats = each(cells(rows, prompt.messages), messages_of)
            return each(chats, lambda messages: guard.text(messages, self._chat))
        if self._template is not None:
            return each(self._template_rows(rows), lambda row: guard.text(row, self._templated))
        assert prompt.text is not None
        return each(cells(rows, prompt.text), lambda text: guard.text(text_of(text), self._text))

    def _template_rows(self, rows: pa.Table) -> list[dict[str, object] | RowRejected]:
        """The columns that the template reads, row by row."""
        assert self._template is not None
        columns = {name: cells(rows, name) for name in self._template.columns}

        def row(index: object) -> dict[str, object]:
            assert isinstance(index, int)
            return {name: accepted(values[index]) for name, values in columns.items()}

        return each(range(rows.num_rows), row)

    def _templated(self, row: dict[str, object]) -> str:
        assert self._template is not None
        return self._text(text_of(self._template.render(row)))

    def _text(self, text: str) -> str:
        return self._chat([{"role": "user", "content": text}]) if self._prompt.applies_chat_template else text

    def _chat(self, messages: list[Message]) -> str:
        """The checkpoint's chat template over the messages, the system prompt first unless they bring one."""
        assert self._chat_template is not None
        if self._prompt.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._prompt.system}, *messages]
        return text_of(self._chat_template.render(messages))

    def _token_ids(self, rows: pa.Table) -> list[list[int] | RowRejected]:
        """A chat template writes its own special tokens; plain text gets those that the tokenizer adds by itself."""
        if self._prompt.token_ids is not None:
            return each(cells(rows, self._prompt.token_ids), token_ids_of)
        return self._guard.encode(self._texts(rows), add_special_tokens=not self._prompt.applies_chat_template)

    def _framing(self) -> list[str]:
        """The texts that the job puts around its rows: what they hold of marks, no row may say."""
        texts = [] if self._template is None else [self._template.source]
        if self._chat_template is not None:
            texts.append(self._chat_template.source)
            user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
            for system in ([], [{"role": "system", "content": "Hm"}]):
                # A template may refuse a chat, or insist on what only real rows have.
                with suppress(RowRejected):
                    texts.append(self._chat_template.render([*system, user, assistant, user]))
        return texts

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
