"""``prompt.control_tokens``: rows become texts and texts token ids without saying more than words.

A row that holds nothing like a control token goes the short way: one render, one encode, as without any guard. The
others are escaped, and then compared with what the same row would be with harmless characters in their place: if the
encoded prompt has another sequence of control tokens or marks (two columns whose pieces make one token, a normalizer
that composes one), the row is a dead letter.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from batchinfer.errors import RowRejected
from batchinfer.prompts.control_tokens import ControlTokens, Row, holds_private_characters, rebuilt, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptGuard", "RowText"]

#: A role is a word; templates write it between their marks.
_ROLE = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True, slots=True)
class RowText:
    """A row as text. ``harmless`` is set where the encoded prompt has to be compared with it; with
    ``has_placeholders`` the names of control tokens in the row have given way to private characters.
    """

    text: str
    harmless: str | None = None
    has_placeholders: bool = False


class PromptGuard:
    """Applies one rule to the rows of a job. Threads may share it.

    ``framing``: see :class:`ControlTokens`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        rule: Literal["escape", "allow", "reject"],
        framing: Collection[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._rule = rule
        self._tokens = ControlTokens(tokenizer, framing)

    def text(self, row: Row, render: Callable[[Row], str], *, may_reject: bool = True) -> RowText:
        """``render(row)`` with the row's own strings escaped. ``render`` is called up to four times.

        Without ``may_reject`` a rule to reject escapes: for strings that the row is not to blame for. Raises what
        ``render`` raises, and RowRejected: control_tokens; bad_messages for a role that is no word.
        """
        if self._rule == "allow":
            return RowText(render(row))
        _check_roles(row)
        tokens = self._tokens
        own = list(strings(row))
        if not any(map(tokens.is_suspicious, own)):
            return RowText(render(row))
        found = next(filter(None, map(tokens.first_in, own)), None)
        if found is not None and self._rule == "reject" and may_reject:
            raise RowRejected("control_tokens", f"the row holds the control token {found!r}")
        if found is not None:
            return self._escaped(row, render, keeps_text=not any(map(holds_private_characters, own)))
        return RowText(render(row), self._harmless(row, render))

    def _escaped(self, row: Row, render: Callable[[Row], str], *, keeps_text: bool) -> RowText:
        tokens = self._tokens
        row = rebuilt(row, tokens.without_marks)
        text, harmless = render(row), self._harmless(row, render)
        spaced = rebuilt(row, tokens.without_names)
        if spaced == row:
            return RowText(text, harmless)
        if keeps_text and tokens.can_keep_text:
            placed = render(rebuilt(row, tokens.with_placeholders))
            # Not so where a template cuts or encodes a row's string: there its names cannot be told apart.
            if tokens.restored(placed) == text:
                return RowText(placed, harmless, has_placeholders=True)
        return RowText(render(spaced), harmless)

    def _harmless(self, row: Row, render: Callable[[Row], str]) -> str:
        harmless = rebuilt(row, self._tokens.harmless)
        try:
            return render(harmless)
        except RowRejected as error:
            reason = f"without what looks like a control token in it, the row cannot be rendered ({error.error})"
            raise RowRejected("control_tokens", reason) from None

    def encode(
        self, texts: Sequence[RowText | RowRejected], *, add_special_tokens: bool
    ) -> list[list[int] | RowRejected]:
        """Token ids of each text, or why there are none."""
        encoded = self._encode_all(texts, add_special_tokens=add_special_tokens)
        compared = [row.harmless for row in texts if isinstance(row, RowText) and row.harmless is not None]
        harmless_ids = iter(self._encode(compared, add_special_tokens=add_special_tokens))
        results: list[list[int] | RowRejected] = []
        for row in texts:
            if isinstance(row, RowRejected):
                results.append(row)
                continue
            token_ids = next(encoded)
            if row.harmless is not None:
                text = self._tokens.restored(row.text) if row.has_placeholders else row.text
                if self._tokens.said(token_ids, text) != self._tokens.said(next(harmless_ids), row.harmless):
                    reason = "strings of the row make up a control token together, or its template needs one in them"
                    results.append(RowRejected("control_tokens", reason))
                    continue
            results.append(token_ids)
        return results

    def _encode_all(self, texts: Sequence[RowText | RowRejected], *, add_special_tokens: bool) -> Iterator[list[int]]:
        """The token ids of the texts that there are, in order."""
        rows = [row for row in texts if isinstance(row, RowText)]
        placed = [row.text for row in rows if row.has_placeholders]
        ordinary = [row.text for row in rows if not row.has_placeholders]
        ids = {
            True: iter(self._tokens.encode_names_as_text(placed, add_special_tokens=add_special_tokens)),
            False: iter(self._encode(ordinary, add_special_tokens=add_special_tokens)),
        }
        return (next(ids[row.has_placeholders]) for row in rows)

    def _encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """One tokenizer call for all: it runs in Rust, on several threads, without the GIL."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded


def _check_roles(row: object) -> None:
    for index, message in enumerate(row if isinstance(row, list) else ()):
        if not _ROLE.fullmatch(str(message["role"])):
            raise RowRejected("bad_messages", f"the role of message {index} is not a word")
