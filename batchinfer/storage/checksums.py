"""Checksums over whole files: one flipped bit anywhere in a part, in plan.parquet or in job.json is found.

Parquet's own page checksums cover what is inside the pages, not the page headers, the statistics or the footer.
So a Parquet file of ours carries the SHA-256 of all its other bytes, in a gap between its last page and its
footer: readers go by the footer's absolute offsets and never look there. Before it, in the same gap, is a label: a
few bytes of the writer's that are read without decoding the footer, which a resume over 100,000 parts would feel.

::

    PAR1 | pages | mark (16 bytes) | label (32) | SHA-256 of everything else (32) | footer | its length | PAR1

job.json carries its checksum as its last key, taken over the text with that value empty.
"""

import hashlib
from typing import Final

from batchinfer.storage.location import Location

LABEL_BYTES: Final = 32

_MARK: Final = b"batchinfer:seal1"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_GAP_BYTES: Final = len(_MARK) + LABEL_BYTES + _DIGEST_BYTES
#: Footer length (4 bytes, little endian) and magic at a Parquet file's end.
_END_BYTES: Final = 8
_MAGIC: Final = b"PAR1"
#: First read for a label; with footers of parts of usual width, the only one.
_TAIL_BYTES: Final = 16 * 1024
_JSON_KEY: Final = "checksum"


def add_to_parquet(content: bytes, label: bytes = bytes(LABEL_BYTES)) -> bytes:
    """A Parquet file with a label and its checksum in it; what readers see of it stays the same."""
    assert len(label) == LABEL_BYTES
    border = _start_of_footer(content, len(content))
    body, footer = content[:border] + _MARK + label, content[border:]
    return b"".join((body, _digest(body, footer), footer))


def holds_in_parquet(content: bytes) -> bool:
    """Whether a whole Parquet file carries a checksum and every byte is as it was when that was taken."""
    if len(content) < _END_BYTES:
        return False
    border = _start_of_footer(content, len(content))
    if border < _GAP_BYTES or content[border - _GAP_BYTES :][: len(_MARK)] != _MARK:
        return False
    view, start = memoryview(content), border - _DIGEST_BYTES
    return bytes(view[start:border]) == _digest(view[:start], view[border:])


def read_label(location: Location, size_bytes: int) -> bytes | None:
    """The label of a Parquet file, in one or two ranged reads; None when it has none. No checksum is taken."""
    tail = location.read_range(max(0, size_bytes - _TAIL_BYTES), min(size_bytes, _TAIL_BYTES))
    if len(tail) < _END_BYTES or tail[-4:] != _MAGIC:
        return None
    border = _start_of_footer(tail, size_bytes)
    if border < _GAP_BYTES:
        return None
    start = border - _GAP_BYTES - (size_bytes - len(tail))
    gap = tail[start : start + _GAP_BYTES] if start >= 0 else location.read_range(border - _GAP_BYTES, _GAP_BYTES)
    return gap[len(_MARK) : len(_MARK) + LABEL_BYTES] if gap.startswith(_MARK) else None


def add_to_json(text: str) -> str:
    """The text of a JSON object, not empty and without a checksum, with its checksum as the last key."""
    body = text.rstrip().removesuffix("}").rstrip()
    return _json_with(body, hashlib.sha256(_json_with(body, "").encode()).hexdigest())


def holds_in_json(text: str, stated: object) -> bool:
    """Whether a JSON object's text is as it was when the checksum ``stated`` in it was taken."""
    ending = _json_ending(str(stated))
    if not text.endswith(ending):
        return False
    return hashlib.sha256(_json_with(text.removesuffix(ending), "").encode()).hexdigest() == stated


def _json_with(body: str, checksum: str) -> str:
    return body + _json_ending(checksum)


def _json_ending(checksum: str) -> str:
    return f',\n  "{_JSON_KEY}": "{checksum}"\n}}\n'


def _start_of_footer(tail: bytes, size_bytes: int) -> int:
    return size_bytes - _END_BYTES - int.from_bytes(tail[-_END_BYTES:-4], "little")


def _digest(body: bytes | memoryview, footer: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(body)
    digest.update(footer)
    return digest.digest()
