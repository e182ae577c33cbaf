"""The bytes of a JSON Lines file in order, decompressed where it is compressed, in bounded memory."""

import io
from collections.abc import Callable, Iterator
from typing import Final

import pyarrow as pa

from batchinfer.errors import ShardCorrupt
from batchinfer.records import LineCompression
from batchinfer.storage.location import Location

#: Fetched by one request.
_FETCH_BYTES: Final = 8 * 1024 * 1024
#: Lines are parsed and found again by blocks of about this size. The first is small: it is parsed the slow way, from
#: which the others learn their types.
_BLOCK_BYTES: Final = 1024 * 1024
_FIRST_BLOCK_BYTES: Final = 64 * 1024
#: A longer line is no prompt; likely the file is one JSON document.
MAX_LINE_BYTES: Final = 64 * 1024 * 1024

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_SUFFIXES: "Final[dict[str, LineCompression]]" = {".gz": "gzip", ".zst": "zstd"}


def compression_of(name: str) -> LineCompression | None:
    """What the end of a file's name says of its bytes."""
    return next((codec for suffix, codec in _SUFFIXES.items() if name.lower().endswith(suffix)), None)


class FileBytes(io.RawIOBase):
    """A file's first ``size_bytes`` bytes, fetched in large pieces; ``on_bytes`` sees each of them once.

    Raises ShardCorrupt when the file ends before, and what its location raises.
    """

    def __init__(self, location: Location, size_bytes: int, on_bytes: Callable[[bytes], object] | None = None) -> None:
        super().__init__()
        self._location = location
        self._size_bytes = size_bytes
        self._on_bytes = on_bytes
        self._position = 0
        self._fetched = memoryview(b"")

    def read(self, num_bytes: int = -1) -> bytes:
        """At most ``num_bytes`` of the next bytes; none at the end."""
        if not self._fetched:
            self._fetch()
        end = num_bytes if num_bytes >= 0 else len(self._fetched)
        taken = bytes(self._fetched[:end])
        self._fetched = self._fetched[end:]
        return taken

    def readable(self) -> bool:
        return True

    def _fetch(self) -> None:
        wanted = min(_FETCH_BYTES, self._size_bytes - self._position)
        if not wanted:
            return
        content = self._location.read_range(self._position, wanted)
        if len(content) < wanted:
            raise ShardCorrupt(f"ends after {self._position + len(content)} of {self._size_bytes} bytes")
        self._position += wanted
        if self._on_bytes is not None:
            self._on_bytes(content)
        self._fetched = memoryview(content)


class LineBytes:
    """The decompressed bytes of a JSON Lines file, forward only. One thread at a time."""

    def __init__(self, source: FileBytes, compression: LineCompression | None) -> None:
        self._source = source
        self._inner = None if compression is None else pa.CompressedInputStream(pa.PythonFile(source, "r"), compression)
        #: Of the next byte.
        self.position = 0

    def read(self, num_bytes: int) -> bytes:
        """The next ``num_bytes`` bytes, fewer at the end. Raises ShardCorrupt for what cannot be decompressed."""
        pieces: list[bytes] = []
        missing = num_bytes
        while missing and (piece := self._read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        self.position += num_bytes - missing
        return b"".join(pieces)

    def skip_to(self, position: int) -> None:
        """Read on to ``position``, which must not lie behind."""
        while self.position < position and self.read(min(_BLOCK_BYTES, position - self.position)):
            pass

    def _read(self, num_bytes: int) -> bytes:
        if self._inner is None:
            return self._source.read(num_bytes)
        try:
            return self._inner.read(num_bytes)
        except OSError as error:
            # The storage's own errors come as batchinfer's, so this is Arrow's word for bad content.
            raise ShardCorrupt(f"cannot be decompressed: {error}") from error


def blocks(stream: LineBytes) -> Iterator[tuple[int, bytes]]:
    """Runs of whole lines with the position of their first byte; a last line may lack its line break.

    A byte order mark at the beginning is in none of them. Raises ShardCorrupt for a line without end.
    """
    rest = stream.read(len(_BYTE_ORDER_MARK))
    rest = b"" if rest == _BYTE_ORDER_MARK else rest
    first_byte = stream.position - len(rest)
    block_bytes = _FIRST_BLOCK_BYTES
    pieces = [rest]
    num_bytes = len(rest)
    while piece := stream.read(block_bytes):
        end = piece.rfind(b"\n") + 1
        if not end:
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > MAX_LINE_BYTES:
                raise ShardCorrupt(
                    f"a line is longer than {MAX_LINE_BYTES >> 20} MiB; JSON Lines has one small object a line: is it "
                    "one JSON document?"
                )
            continue
        block = b"".join((*pieces, piece[:end]))
        yield first_byte, block
        first_byte += len(block)
        block_bytes = _BLOCK_BYTES
        pieces, num_bytes = [piece[end:]], len(piece) - end
    if last := b"".join(pieces):
        yield first_byte, last
