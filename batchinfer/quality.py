"""What can be told of a completion without reading it: is it empty, cut off, a loop, in another script than asked?

Pure, and bounded in time: whatever a completion's length, only its last few thousand characters are looked at. The
rules, which the counts of units, status and the circuit breaker all mean:

* **empty**: nothing but white space; without a tokenizer, no token before the one that stopped it.
* **truncated**: it ended because ``max_new_tokens`` or the model's length did (``finish_reason`` length).
* **repeating**: it ends in a loop: its last :data:`MIN_LOOP_CHARACTERS` characters or more are one block, up to
  :data:`MAX_BLOCK_CHARACTERS` long, :data:`MIN_REPEATS` times or more in a row. Token ids take the place of
  characters in a model without a tokenizer (:data:`MIN_LOOP_TOKENS`).
* **wrong_script**: fewer than half of its letters are of the scripts asked for. Digits and signs are no letters, and
  code between backticks and web addresses are left out, as is a reasoning model's thought before its answer. A
  completion of fewer than :data:`MIN_LETTERS` letters is never wrong.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from batchinfer.records import Completion

QualityKind = Literal["empty", "truncated", "repeating", "wrong_script"]
QUALITY_KINDS: Final[tuple[QualityKind, ...]] = ("empty", "truncated", "repeating", "wrong_script")

Script = Literal[
    "arabic", "cyrillic", "devanagari", "greek", "han", "hangul", "hebrew", "kana", "latin", "thai"
]  # fmt: skip

MIN_LOOP_CHARACTERS: Final = 120
MIN_LOOP_TOKENS: Final = 40
MAX_BLOCK_CHARACTERS: Final = 1024
MIN_REPEATS: Final = 4
MIN_LETTERS: Final = 8

#: A loop of the longest block fits, and so does what a script is told by.
_LOOK_AT_CHARACTERS = MAX_BLOCK_CHARACTERS * MIN_REPEATS
#: What recurs at a loop's period; texts seldom repeat so many characters by chance.
_PROBE_CHARACTERS = 24

#: Code points of each script's letters, as the inside of a character class.
_RANGES: Final[dict[Script, str]] = {
    "arabic": "\u0600-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u1d2b\u1d78\ua640-\ua69f",
    "devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "greek": "\u0370-\u03e1\u03f0-\u03ff\u1f00-\u1fff",
    "han": "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "hangul": "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "kana": "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f",
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u0250-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\ufb00-\ufb06"
    "\uff21-\uff3a\uff41-\uff5a",
    "thai": "\u0e01-\u0e4f",
}
_LETTERS = re.compile(r"[^\W\d_]+")
_THOUGHT_ENDS = ("</thought>", "</think>")
#: Fenced and inline code, an open fence to the end, and web addresses; each alternative is linear.
_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CompletionJudge:
    """Tells what is amiss with completions; ``scripts`` is empty where any will do."""

    scripts: tuple[Script, ...] = ()
    #: Whether completions have a text; without a tokenizer only their token ids can be judged.
    has_text: bool = True

    def kinds(self, completion: Completion) -> list[QualityKind]:
        """What is amiss with one completion, in the order of :data:`QUALITY_KINDS`; mostly nothing."""
        return self.kinds_of(completion.text, completion.token_ids, completion.finish_reason)

    def kinds_of(self, text: str, token_ids: Sequence[int], finish_reason: str) -> list[QualityKind]:
        """The same from its pieces; ``token_ids`` is looked at only where there is no text."""
        found: list[QualityKind] = []
        is_empty = not text.strip() if self.has_text else len(token_ids) <= (finish_reason == "stop")
        if is_empty:
            found.append("empty")
        if finish_reason == "length":
            found.append("truncated")
        if self.has_text:
            repeats = ends_in_loop(text, MIN_LOOP_CHARACTERS)
        else:
            # A character for each id, so that both kinds of loop are found at the speed of a string search.
            repeats = ends_in_loop("".join(map(chr, token_ids[-_LOOK_AT_CHARACTERS:])), MIN_LOOP_TOKENS)
        if repeats:
            found.append("repeating")
        if self.scripts and self.has_text and not is_written_in(self.scripts, text):
            found.append("wrong_script")
        return found

    def count(self, completions: Iterable[Completion]) -> dict[str, int]:
        """Number of completions by what is amiss with them; kinds that do not occur are left out."""
        return dict(Counter(kind for completion in completions for kind in self.kinds(completion)))


def ends_in_loop(symbols: str, min_length: int) -> bool:
    """Whether the end of ``symbols``, ``min_length`` or more of it, is one block again and again.

    The last turn may be cut anywhere. A bounded number of string comparisons, whatever the length.
    """
    if len(symbols) < min_length:
        return False
    end = symbols[-_LOOK_AT_CHARACTERS:]
    probe, last = end[-_PROBE_CHARACTERS:], len(end) - _PROBE_CHARACTERS
    # Each earlier place of the last few symbols is a period to try, the shortest first.
    place = end.rfind(probe, 0, len(end) - 1)
    while place >= 0 and (period := last - place) <= MAX_BLOCK_CHARACTERS:
        length = max(min_length, MIN_REPEATS * period)
        if length <= len(end) and end[-length:-period] == end[-length + period :]:
            return True
        place = end.rfind(probe, 0, place + _PROBE_CHARACTERS - 1)
    return False


def is_written_in(scripts: Sequence[Script], text: str) -> bool:
    """Whether half or more of the letters of ``text`` are of ``scripts``; also where there are next to none."""
    start = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in _THOUGHT_ENDS)
    prose = _NOT_PROSE.sub(" ", text[start : start + _LOOK_AT_CHARACTERS])
    letters = "".join(_LETTERS.findall(prose))
    if len(letters) < MIN_LETTERS:
        return True
    others = re.sub(f"[{''.join(_RANGES[script] for script in scripts)}]+", "", letters)
    return 2 * len(others) <= len(letters)
