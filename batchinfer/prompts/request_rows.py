"""Rows of API requests become token ids and sampling: each by its own endpoint's rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from batchinfer.errors import RowRejected
from batchinfer.prompts.guard import PromptGuard, RowText
from batchinfer.prompts.request import CHAT_URL, METHOD_COLUMN, URL_COLUMN, Request, request_of
from batchinfer.prompts.sampling import RowSampling
from batchinfer.prompts.values import Message, accepted, cells, each, messages_of, text_of, token_ids_of
from batchinfer.records import SamplingParams
from batchinfer.spec import PromptSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A chat and the template variables of its own, as text.
RenderChat = Callable[[list[Message], Mapping[str, object]], str]


class RequestRows:
    """Reads ``prompt.request`` for one job and one model. Threads may share it.

    ``chat_guard`` and ``render_chat`` are those of the job's chats. What /v1/completions sends is the user's own
    format: it stands for itself, control tokens too, unless the job has a rule for them.
    """

    def __init__(
        self,
        prompt: PromptSpec,
        tokenizer: "PreTrainedTokenizerBase",
        chat_guard: PromptGuard,
        render_chat: RenderChat,
        sampling: RowSampling,
    ) -> None:
        assert prompt.request is not None
        self._column = prompt.request
        self._serves_chat = prompt.applies_chat_template
        self._chat_guard = chat_guard
        self._text_guard = PromptGuard(tokenizer, prompt.control_tokens or "allow", ())
        self._render_chat = render_chat
        self._sampling = sampling

    def read(self, rows: pa.Table) -> tuple[list[list[int] | RowRejected], Sequence[SamplingParams | RowRejected]]:
        """Of every row its token ids and its sampling, or in their place why there are none."""
        requests = self._requests(rows)
        chats: dict[int, RowText] = {}
        texts: dict[int, RowText] = {}
        token_ids: list[list[int] | RowRejected] = [[]] * len(requests)
        for index, request in enumerate(requests):
            try:
                asked = accepted(request)
                if asked.messages is not None:
                    chats[index] = self._chat(asked.messages, asked.template_kwargs)
                elif asked.text is not None:
                    texts[index] = self._text_guard.text(text_of(asked.text), str)
                else:
                    token_ids[index] = token_ids_of(asked.token_ids)
            except RowRejected as rejected:
                token_ids[index] = rejected
        # A chat template writes its own special tokens; plain text gets those that the tokenizer adds by itself.
        for found, guard, adds in ((chats, self._chat_guard, False), (texts, self._text_guard, True)):
            encoded = guard.encode(list(found.values()), add_special_tokens=adds)
            for index, ids in zip(found, encoded, strict=True):
                token_ids[index] = ids
        return token_ids, each(requests, lambda request: self._sampling.params(request.sampling))

    def _requests(self, rows: pa.Table) -> list[Request | RowRejected]:
        urls, methods = (
            cells(rows, name) if name in rows.column_names else [None] * rows.num_rows
            for name in (URL_COLUMN, METHOD_COLUMN)
        )
        lines = zip(cells(rows, self._column), urls, methods, strict=True)
        return each(list(lines), lambda line: request_of(*map(accepted, line)))

    def _chat(self, messages: list[Message], variables: Mapping[str, object]) -> RowText:
        if not self._serves_chat:
            reason = f"url: {CHAT_URL} needs a chat template, and the job has prompt.chat: false"
            raise RowRejected("unsupported_field", reason)
        return self._chat_guard.text(messages_of(messages), lambda chat: self._render_chat(chat, variables))
