"""Token ids of completions become text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes with special tokens skipped and spaces left as they are. Ids without a token decode to nothing.

    Goes to the tokenizer's Rust backend directly where there is one (a third of the time, and without the GIL).
    Bytes that end in the middle of a character become U+FFFD. Safe to share between threads.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of one sequence."""
        return self.decode_batch([token_ids])[0]

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """The texts of several sequences, in order."""
        lists = [list(token_ids) for token_ids in batch]
        if self._backend is not None:
            texts: list[str] = self._backend.decode_batch(lists, skip_special_tokens=True)
            return texts
        return self._tokenizer.batch_decode(lists, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_json(self) -> bool:
        """Whether :meth:`to_json` can be had."""
        return self._backend is not None

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, added tokens of its other files included."""
        assert self._backend is not None
        text: str = self._backend.to_str()
        return text

    def plain_ids(self) -> tuple[int, int]:
        """(number of ids, ids below which special tokens lie): where made-up completions may draw from."""
        num_ids = len(self._tokenizer)
        low = [token_id for token_id in self._tokenizer.all_special_ids if token_id < num_ids // 2]
        return num_ids, max(low, default=-1) + 1
