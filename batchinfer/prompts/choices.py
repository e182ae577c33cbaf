"""``sampling.choices``: the texts a row chooses among, as token ids."""

from typing import TYPE_CHECKING

from batchinfer.errors import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Distinct lists of choices kept tokenised; a job has one, unless its rows bring their own.
_MAX_CACHED = 4096


class ChoiceTokenizer:
    """Tokenises lists of choices; equal ones once. Threads may share it.

    A choice is tokenised by itself, without the special tokens that the tokenizer adds to a text, and put behind the
    prompt as it is. A control token written in it is one: nothing is generated behind a choice, so a row can say no
    more with it than what its score is to be. ``vocab_size`` is the model's number of token ids (None = unchecked).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._cache: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def token_ids(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Of each choice, at least one. Raises RowRejected("bad_sampling") for choices that cannot be told apart or
        scored."""
        found = self._cache.get(choices)
        if found is None:
            found = self._tokenised(choices)
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[choices] = found
        return found

    def _tokenised(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        encoded: list[list[int]] = self._tokenizer(
            list(choices),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        seen: dict[tuple[int, ...], str] = {}
        for choice, ids in zip(choices, encoded, strict=True):
            if not ids:
                raise RowRejected("bad_sampling", f"choices: {choice!r} has no tokens")
            if self._vocab_size is not None and max(ids) >= self._vocab_size:
                reason = f"token id {max(ids)} of {choice!r} is outside the model's {self._vocab_size} token ids"
                raise RowRejected("bad_sampling", f"choices: {reason}")
            other = seen.setdefault(tuple(ids), choice)
            if other != choice:
                raise RowRejected("bad_sampling", f"choices: {other!r} and {choice!r} are the same tokens")
        return tuple(seen)
