"""When a completion's text contains a stop string: decided token by token, and cut once at the end.

Pure Python. A stop string may begin and end inside tokens and a character may be spread over several, so the
question is asked of decoded text, but only of a bounded tail of it.
"""

from collections.abc import Sequence

from batchinfer.engine.engine import Decode

#: Characters at the left edge of a decoded tail that may be wrong: up to three U+FFFD of a character cut in
#: two, a leading space that some tokenisers drop, and their clean-up of spaces before punctuation.
_EDGE_CHARACTERS = 8

#: Tokens a tail may hold per needed character, however little text they have: only a stop string with several
#: times its length of empty tokens in its middle can be missed.
_MAX_TOKENS_PER_CHARACTER = 16


class StopMatcher:
    """Watches one sequence; :meth:`feed` says whether a stop string has just been completed.

    Equal to searching ``decode(all tokens so far)`` after each token, at the cost of decoding a tail whose
    length depends on the longest stop string alone. Stop strings that are complete within the first
    ``num_ignored_tokens`` tokens do not count.
    """

    def __init__(self, stops: Sequence[str], decode: Decode, num_ignored_tokens: int = 0) -> None:
        self._stops = tuple(stops)
        self._decode = decode
        self._needed_characters = max(map(len, self._stops)) + _EDGE_CHARACTERS
        self._tail: list[int] = []
        self._tail_limit = 2 * self._needed_characters
        self._max_tail_tokens = _MAX_TOKENS_PER_CHARACTER * self._needed_characters
        self._num_to_ignore = num_ignored_tokens
        self._num_ignored_characters = 0

    def feed(self, token_id: int) -> bool:
        """Take the next token; true when the text now holds a stop string. Not to be called again after that."""
        self._tail.append(token_id)
        text = self._decode(self._tail)
        if self._num_to_ignore > 0:
            self._num_to_ignore -= 1
            self._num_ignored_characters = len(text)
            stopped = False
        else:
            stopped = find_stop(text, self._stops, self._num_ignored_characters) is not None
        if len(self._tail) >= self._tail_limit:
            self._shorten(len(text))
        return stopped

    def _shorten(self, num_characters: int) -> None:
        """Drop the older half of the tail if the younger half still holds any stop string in the making."""
        younger = self._tail[len(self._tail) // 2 :]
        num_kept = len(self._decode(younger))
        if num_kept < self._needed_characters and len(self._tail) < self._max_tail_tokens:
            self._tail_limit = 2 * len(self._tail)
            return
        self._num_ignored_characters = max(0, self._num_ignored_characters - (num_characters - num_kept))
        self._tail = younger
        self._tail_limit = max(2 * len(younger), 2 * self._needed_characters)


def find_stop(text: str, stops: Sequence[str], num_ignored_characters: int = 0) -> int | None:
    """Where the earliest stop string begins; those that end within the ignored characters do not count."""
    found = (text.find(stop, max(0, num_ignored_characters - len(stop) + 1)) for stop in stops)
    return min((start for start in found if start >= 0), default=None)


def cut_text(text: str, stops: Sequence[str], num_ignored_characters: int = 0) -> str:
    """The text before its earliest stop string, or all of it.

    With ``min_new_tokens``, pass the length of the text of that many first tokens as
    ``num_ignored_characters``: the engine ignored stop strings which end in there, and so does the cut.
    """
    start = find_stop(text, stops, num_ignored_characters)
    return text if start is None else text[:start]
