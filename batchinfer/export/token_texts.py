"""Token ids as the API spells them beside log-probabilities: each token's text, its bytes, its place in the whole."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from batchinfer.errors import ModelError, OutputError
from batchinfer.models import hub

__all__ = ["TokenTexts", "load_token_texts"]

_TOKENIZER_FILE = "tokenizer.json"
#: A token that stands for one byte, in vocabularies of SentencePiece's kind; and their word for a blank.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"

#: One position as parts hold it: token_id, logprob, top.
Position = Mapping[str, Any]


class TokenTexts:
    """The tokens of one tokenizer. Special tokens have no bytes: completions are written without them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        described = json.loads(tokenizer.to_str())
        self._special = {token["id"] for token in described["added_tokens"] if token["special"]}
        self._plain = {token["id"]: token["content"] for token in described["added_tokens"]}
        self._byte_of = _byte_alphabet() if "ByteLevel" in json.dumps(described["decoder"]) else {}
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spelt(token_id)
        return found

    def of_chat(self, text: str, positions: Sequence[Position]) -> dict[str, Any]:
        """``logprobs`` of a chat's choice: the positions that ``text`` is made of."""
        return {
            "content": [
                {
                    **self._token(position["token_id"], position["logprob"]),
                    "top_logprobs": [self._token(top["token_id"], top["logprob"]) for top in position["top"]],
                }
                for position, _ in self._within(text, positions)
            ],
            "refusal": None,
        }

    def of_text(self, text: str, positions: Sequence[Position]) -> dict[str, Any]:
        """``logprobs`` of a text's choice, offsets counted in characters from its beginning."""
        within = list(self._within(text, positions))
        encoded = text.encode()
        return {
            "tokens": [self._text(position["token_id"]) for position, _ in within],
            "token_logprobs": [position["logprob"] for position, _ in within],
            "top_logprobs": [
                {self._text(top["token_id"]): top["logprob"] for top in reversed(position["top"])}
                for position, _ in within
            ],
            "text_offset": [len(encoded[:start].decode(errors="ignore")) for _, start in within],
        }

    def _within(self, text: str, positions: Sequence[Position]) -> Iterator[tuple[Position, int]]:
        """The positions before the text's end, with the byte at which each begins: what stopped it is left out."""
        encoded = text.encode()
        num_bytes, start = len(encoded), 0
        for position in positions:
            spelt = self.bytes_of(position["token_id"])
            if start >= num_bytes:
                return
            # Decoders of SentencePiece's kind take the blank off the first word.
            if start == 0 and spelt[:1] == b" " and encoded[:1] != b" ":
                spelt = spelt[1:]
            yield position, start
            start += len(spelt)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelt = self.bytes_of(token_id)
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(spelt)}

    def _text(self, token_id: int) -> str:
        """A special token by its name; of half a character the sign for one."""
        if token_id in self._special:
            return str(self._plain[token_id])
        return self.bytes_of(token_id).decode(errors="replace")

    def _spelt(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._plain:
            return str(self._plain[token_id]).encode()
        name = self._tokenizer.id_to_token(token_id)
        if name is None:
            return b""
        if self._byte_of and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return str(name).replace(_BLANK, " ").encode()


def load_token_texts(path: str, revision: str | None = None) -> TokenTexts:
    """Of the tokenizer.json in a directory, or of a hub model. Raises OutputError when there is none."""
    place = Path(path).expanduser()
    try:
        if not place.is_dir() and "://" not in path:
            place = hub.snapshot(path, revision, (_TOKENIZER_FILE,))
        return TokenTexts(Tokenizer.from_file(str(place / _TOKENIZER_FILE)))
    except Exception as error:
        # The tokenizers package raises a bare Exception for whatever it cannot read.
        if not isinstance(error, ModelError) and type(error) is not Exception:
            raise
        raise OutputError(
            f"{path}: log-probabilities need the text of each token, and its {_TOKENIZER_FILE} cannot be read "
            f"({error}); name a directory that holds it: --tokenizer DIRECTORY"
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for themselves."""
    own = [byte for byte in range(256) if chr(byte) in set(ByteLevel.alphabet()) and byte < 256]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}
