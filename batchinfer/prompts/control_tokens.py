"""What a row's own strings must not say: tokens that begin or end a turn or a sequence, and marks that mean the same.

Two kinds. A **control token** is a token of the tokenizer that no ordinary text becomes: every special token, and those
among its other added tokens that the chat template uses as marks. A **plain mark** is spelt in ordinary tokens, as
EXAONE 3.x spells ``[|user|]``. Tags of content (``<think>``, ``<tool_call>``) are neither unless the tokenizer calls
them special: they open no turn, and chat templates themselves look for them in messages.

Escaped, a control token is the same characters as ordinary tokens: the text does not change. A plain mark is made of
ordinary tokens already, so its text has to change: one blank behind its first character (``[ |user|]``).

How control tokens become ordinary ones: a copy of the tokenizer knows each of them by a private character instead of
its name. Text in which the template's own tokens have been given their private characters is encoded by that copy in
one piece, so the names that rows contain are text like any other, up to the merges at their borders.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ControlTokens", "Row", "holds_private_characters", "rebuilt", "strings"]

#: A row's own values: strings, and lists, tuples and dicts of them.
Row = TypeVar("Row")

#: The notations of chat marks; of the first three, a template that uses one claims them all, whatever the name inside.
_NOTATIONS = (
    re.compile(r"\[\|[^\[\]|\n]{1,32}\|\]"),
    re.compile(r"<\|[^<>|\n]{1,32}\|>"),
    re.compile("<\uff5c[^<>\uff5c\n]{1,32}\uff5c>"),
)
_OTHER_MARKS = re.compile(r"\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>")
#: What a template's own marks are called; between the same brackets it may also write Jinja.
_MARK_NAME = re.compile(r"[\w.:/-]+")
_TAG = re.compile(r"</?\w+>")
#: Private characters: the tokens' in the copy of the tokenizer, and one that stands for each name a row contains.
_TOKEN_CHARACTER = 0x100000
_NAME_CHARACTER = 0xF0000
_MAX_TOKENS = 0xFFFE
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_NEVER = re.compile(r"(?!)")


class ControlTokens:
    """The control tokens of a tokenizer and the plain marks of the texts that a job puts around its rows.

    ``framing`` are those texts: templates as written, and chats rendered from harmless messages. Threads may share it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", framing: Collection[str]) -> None:
        self._ids = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or _is_mark(token.content, framing))
        }
        # Ordinary text becomes the unknown token wherever the vocabulary ends; its name is escaped like the others'.
        self._telling_ids = frozenset(self._ids.values()) - {tokenizer.unk_token_id}
        self._names = _any_of(self._ids)
        self._marks = _plain_marks(framing, self._ids)
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = backend.normalizer if backend is not None else None
        # Only what the tokenizer looks for behind its normalizer can be made by it.
        late = (t.content for t in tokenizer.added_tokens_decoder.values() if t.normalized and t.content in self._ids)
        self._made_by_normalizer = re.compile(f"{self._marks.pattern}|{_any_of(late).pattern}")
        self._suspicious = _suspicious(self._ids, self._marks)
        self._private = {name: chr(_TOKEN_CHARACTER + index) for index, name in enumerate(self._ids)}
        self._placeholders = {name: chr(_NAME_CHARACTER + index) for index, name in enumerate(self._ids)}
        self._names_again = {placeholder: name for name, placeholder in self._placeholders.items()}
        self._plain_text = _plain_text_tokenizer(backend, self._ids, self._private)

    @property
    def can_keep_text(self) -> bool:
        """Whether names of control tokens can be encoded as ordinary text (else they are spaced like marks)."""
        return self._plain_text is not None

    def is_suspicious(self, text: str) -> bool:
        """Whether ``text`` might hold a control token or a part of one. False means: certainly not."""
        if self._suspicious.search(text):
            return True
        if self._normalizer is None or text.isascii():
            return False
        return bool(self._suspicious.search(self._normalizer.normalize_str(text)))

    def first_in(self, text: str) -> str | None:
        """The first control token or plain mark in a row's string, the tokenizer's normalizer considered."""
        found = self._marks.search(text) or self._names.search(text)
        if found is None and self._normalizer is not None:
            found = self._made_by_normalizer.search(unicodedata.normalize("NFKC", text))
        return found[0] if found else None

    def without_marks(self, text: str) -> str:
        """``text`` with plain marks spaced; in compatibility form where the tokenizer would make one of it."""
        if self._normalizer is not None and not text.isascii():
            composed = unicodedata.normalize("NFKC", text)
            if self._made_by_normalizer.search(composed):
                text = composed
        return self._marks.sub(_spaced, text)

    def without_names(self, text: str) -> str:
        """``text`` with the names of control tokens spaced: for tokenizers that cannot take them as text."""
        return self._names.sub(_spaced, text)

    def with_placeholders(self, text: str) -> str:
        """``text`` with one private character for each name of a control token; see :meth:`restored`."""
        return self._names.sub(lambda found: self._placeholders[found[0]], text)

    def restored(self, text: str) -> str:
        """``text`` with the names back where :meth:`with_placeholders` took them."""
        return _PRIVATE.sub(lambda found: self._names_again.get(found[0], found[0]), text)

    def harmless(self, text: str) -> str:
        """A text of the same shape that can be no part of a control token: what the row might as well have said."""
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
        return self._suspicious.sub(".", text)

    def encode_names_as_text(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts with placeholders: their names as ordinary text, all other control tokens as such."""
        if not texts:
            return []
        assert self._plain_text is not None
        own = [self._names.sub(lambda found: self._private[found[0]], text) for text in texts]
        encoded = self._plain_text.encode_batch(
            [self.restored(text) for text in own], add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encoded]

    def said(self, token_ids: Iterable[int], text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The control tokens of an encoded prompt and the plain marks of its text, in order."""
        return tuple(i for i in token_ids if i in self._telling_ids), tuple(self._marks.findall(text))


def strings(value: object) -> Iterator[str]:
    """Every string in a row's value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(name)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def rebuilt(value: Row, change: Callable[[str], str]) -> Row:
    """The value with every string changed; other values and the structure stay."""
    made: object = value
    if isinstance(value, str):
        made = change(value)
    elif isinstance(value, dict):
        made = {rebuilt(name, change): rebuilt(item, change) for name, item in value.items()}
    elif isinstance(value, list):
        made = [rebuilt(item, change) for item in value]
    elif isinstance(value, tuple):
        made = tuple(rebuilt(item, change) for item in value)
    return made  # type: ignore[return-value]  # of the same type, as each branch shows


def holds_private_characters(text: str) -> bool:
    """Whether ``text`` has characters that would pass for ours."""
    return _PRIVATE.search(text) is not None


def _is_mark(token: str, framing: Collection[str]) -> bool:
    """Whether an added token that is not special marks turns all the same."""
    if any(notation.fullmatch(token) for notation in _NOTATIONS) or _OTHER_MARKS.fullmatch(token):
        return True
    if token.isspace() or token.isalnum() or _TAG.fullmatch(token):
        return False
    return any(token in text for text in framing)


def _plain_marks(framing: Collection[str], tokens: Collection[str]) -> re.Pattern[str]:
    patterns = []
    for notation in _NOTATIONS:
        marks = {mark for text in framing for mark in notation.findall(text) if _MARK_NAME.fullmatch(mark[2:-2])}
        if marks - set(tokens):
            patterns.append(notation.pattern)
    others = {mark for text in framing for mark in _OTHER_MARKS.findall(text)} - set(tokens)
    patterns += sorted(map(re.escape, others))
    return re.compile("|".join(patterns)) if patterns else _NEVER


def _suspicious(tokens: Collection[str], marks: re.Pattern[str]) -> re.Pattern[str]:
    """A character that control tokens and marks have and words have not, or a whole token without such a one."""
    characters, whole = set(), []
    for token in tokens:
        found = {char for char in token if not char.isalnum() and not char.isspace() and char not in "_-./"}
        characters |= found
        if not found:
            whole.append(token)
    if marks is not _NEVER:
        characters |= set("[]<>|\uff5c")
    patterns = ["[" + re.escape("".join(sorted(characters))) + "]"] if characters else []
    if whole:
        patterns.append(_any_of(whole).pattern)
    return re.compile("|".join(patterns)) if patterns else _NEVER


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Longest first, as tokenizers look for them."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or _NEVER.pattern)


def _spaced(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"


def _plain_text_tokenizer(
    backend: Tokenizer | None, tokens: dict[str, int], private: dict[str, str]
) -> Tokenizer | None:
    """A copy that knows ``tokens`` by their private characters alone; None where none can be made."""
    if backend is None or not tokens or len(tokens) > _MAX_TOKENS:
        return None
    parts = json.loads(backend.to_str())
    parts["truncation"] = parts["padding"] = None
    for token in parts["added_tokens"]:
        token["content"] = private.get(token["content"], token["content"])
    model = parts["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {private.get(piece, piece): index for piece, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[private.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = private.get(model["unk_token"], model["unk_token"])
    try:
        copy = Tokenizer.from_str(json.dumps(parts))
        # A normalizer may drop private characters, and a vocabulary may need a name for a merge.
        found = {name: copy.encode(private[name], add_special_tokens=False).ids for name in tokens}
    except Exception:  # noqa: BLE001 (tokenizers raises bare Exceptions for parts it cannot put together)
        return None
    return copy if found == {name: [token_id] for name, token_id in tokens.items()} else None
