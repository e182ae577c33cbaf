"""Rows of a work unit become prompts: text or chat, token ids, sampling; a row that cannot becomes a dead letter."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa

from batchinfer import grammar_rules
from batchinfer.errors import ModelError, RowRejected, SpecError
from batchinfer.prompts.chat_template import ChatTemplate
from batchinfer.prompts.choices import ChoiceTokenizer
from batchinfer.prompts.columns import check_schema, required_columns
from batchinfer.prompts.conversation import begin_conversation, chat_of, turns_of
from batchinfer.prompts.guard import PromptGuard, RowText
from batchinfer.prompts.request_rows import RequestRows
from batchinfer.prompts.sampling import CheckGrammar, RowSampling
from batchinfer.prompts.sampling_template import SamplingTemplate
from batchinfer.prompts.template import RowTemplate
from batchinfer.prompts.values import Message, accepted, cells, each, messages_of, override_of, text_of, token_ids_of
from batchinfer.records import Conversation, Prompt, RowError, SamplingParams
from batchinfer.spec import PromptSpec, SamplingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptRenderer:
    """Renders and tokenises rows for one job and one model. Threads may share it.

    ``max_model_len`` counts prompt and completion together, in tokens. ``vocab_size`` is the model's number of token
    ids (None = unchecked). ``check_grammar`` is the engine's, where there is one. Raises ModelError when the job
    needs a tokenizer or a chat template that the model does not have, SpecError for a template, stop condition or
    grammar that cannot work.
    """

    def __init__(
        self,
        prompt: PromptSpec,
        sampling: SamplingSpec,
        tokenizer: "PreTrainedTokenizerBase | None",
        max_model_len: int,
        vocab_size: int | None = None,
        check_grammar: CheckGrammar = grammar_rules.problem,
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
        decodes = tokenizer is not None
        self._sampling = RowSampling(sampling, vocab_size, decodes=decodes, check_grammar=check_grammar)
        self._choices = None if tokenizer is None else ChoiceTokenizer(tokenizer, vocab_size)
        if sampling.choices:
            try:
                self._choice_token_ids(self._sampling.job_params)
            except RowRejected as error:
                raise SpecError(f"sampling.{error.error}") from None
        # Ids from the model's own tokenizer are in range, except where the tokenizer is the larger of the two.
        brings_ids = prompt.token_ids is not None or prompt.request is not None
        self._trusts_ids = not brings_ids and tokenizer is not None and len(tokenizer) <= (vocab_size or 0)
        self._sampling_template: SamplingTemplate | None = None
        if prompt.sampling_template is not None:
            self._sampling_template = SamplingTemplate(prompt.sampling_template)
        self._requests: RequestRows | None = None
        if prompt.request is not None and tokenizer is not None:
            self._requests = RequestRows(prompt, tokenizer, self._guard, self._chat, self._sampling)
        #: The columns that ``render`` reads.
        self.required_columns = required_columns(prompt)

    def check_schema(self, schema: pa.Schema, where: str = "the input") -> None:
        """Raise InputError if a required column is missing or has a type that does not fit; see ``columns``."""
        check_schema(self._prompt, self._sampling_spec, schema, where)

    def render(self, rows: pa.Table, row_ids: Sequence[str]) -> list[Prompt | RowError]:
        """One prompt or dead letter per row, in order. ``rows`` holds at least ``required_columns``.

        A prompt whose ``max_new_tokens`` would pass the model's limit gets what still fits. The result of a row does
        not depend on the rows beside it. Dead letters: null_prompt, empty_prompt, bad_text, bad_messages,
        bad_token_ids, bad_sampling, control_tokens, template_error, too_long; of requests also bad_request and
        unsupported_field. Of a row with several turns the prompt is the first one's; see :meth:`render_turns`.
        """
        if self._prompt.turns is not None:
            return self.render_turns(self._conversations(rows, self._prompt.turns), row_ids)
        if self._requests is not None:
            token_ids, sampling = self._requests.read(rows)
        else:
            token_ids, sampling = self._token_ids(rows), self._row_sampling(rows)
        prompts: list[Prompt | RowError] = []
        for row_id, ids, params in zip(row_ids, token_ids, sampling, strict=True):
            try:
                prompts.append(self._fit(row_id, accepted(ids), accepted(params)))
            except RowRejected as error:
                prompts.append(RowError(row_id, error.error_type, error.error))
        return prompts

    def render_turns(
        self, conversations: Sequence[Conversation | RowRejected], row_ids: Sequence[str]
    ) -> list[Prompt | RowError]:
        """The prompt of the turn that each conversation has come to, or the dead letter of its row.

        The same ones as of :meth:`render`; those that are not about the whole row name the turn.
        """
        token_ids = self._guard.encode(each(conversations, self._turn_text), add_special_tokens=False)
        prompts: list[Prompt | RowError] = []
        for row_id, conversation, ids in zip(row_ids, conversations, token_ids, strict=True):
            try:
                prompts.append(self._turn_prompt(row_id, accepted(conversation), ids))
            except RowRejected as error:
                prompts.append(RowError(row_id, error.error_type, error.error))
        return prompts

    def _conversations(self, rows: pa.Table, column: str) -> list[Conversation | RowRejected]:
        turns = each(cells(rows, column), turns_of)
        pairs = zip(turns, self._row_sampling(rows), strict=True)
        return each(list(pairs), lambda pair: begin_conversation(accepted(pair[0]), accepted(pair[1])))

    def _turn_text(self, conversation: Conversation) -> RowText:
        # The guard sees turns still to come too, so that a row it rejects costs nothing. It does not reject a row for
        # what the model said.
        said = (conversation.turns, conversation.answers)
        may_reject = not conversation.answers
        return self._guard.text(said, lambda it: self._chat(chat_of(*it)), may_reject=may_reject)

    def _turn_prompt(self, row_id: str, conversation: Conversation, token_ids: list[int] | RowRejected) -> Prompt:
        try:
            prompt = self._fit(row_id, accepted(token_ids), conversation.sampling)
        except RowRejected as rejected:
            raise RowRejected(rejected.error_type, conversation.named(rejected.error)) from None
        return dataclasses.replace(prompt, conversation=conversation)

    def _texts(self, rows: pa.Table) -> list[RowText | RowRejected]:
        """What the tokenizer reads, per row."""
        prompt, guard = self._prompt, self._guard
        if prompt.messages is not None:
            chats = each(cells(rows, prompt.messages), messages_of)
            return each(chats, lambda messages: guard.text(messages, self._chat))
        if self._template is not None:
            return each(_dicts(rows, self._template.columns), lambda row: guard.text(row, self._templated))
        assert prompt.text is not None
        return each(cells(rows, prompt.text), lambda text: guard.text(text_of(text), self._text))

    def _templated(self, row: dict[str, object]) -> str:
        assert self._template is not None
        return self._text(text_of(self._template.render(row)))

    def _text(self, text: str) -> str:
        return self._chat([{"role": "user", "content": text}]) if self._prompt.applies_chat_template else text

    def _chat(self, messages: list[Message], variables: Mapping[str, object] | None = None) -> str:
        """The checkpoint's chat template over the messages, the system prompt first unless they bring one."""
        assert self._chat_template is not None
        if self._prompt.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._prompt.system}, *messages]
        return text_of(self._chat_template.render(messages, variables))

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
        if self._sampling_template is not None:
            template = self._sampling_template
            return each(_dicts(rows, template.columns), lambda row: self._sampling.params(template.override(row)))
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
        choice_token_ids = self._choice_token_ids(params)
        needed = max(map(len, choice_token_ids)) if choice_token_ids else max(1, params.min_new_tokens)
        if room < needed:
            reason = f"{num_tokens} prompt tokens and {needed} new ones pass the model's limit of {self._max_model_len}"
            raise RowRejected("too_long", reason)
        if params.max_new_tokens > room:
            params = dataclasses.replace(params, max_new_tokens=room)
        return Prompt(row_id, token_ids, params, choice_token_ids)

    def _choice_token_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        return self._choices.token_ids(params.choices) if self._choices is not None and params.choices else ()


def _dicts(rows: pa.Table, names: Sequence[str]) -> list[dict[str, object] | RowRejected]:
    """Some columns row by row, as a template reads them."""
    columns = {name: cells(rows, name) for name in names}

    def row(index: object) -> dict[str, object]:
        assert isinstance(index, int)
        return {name: accepted(values[index]) for name, values in columns.items()}

    return each(range(rows.num_rows), row)
