"""Data sets on a hub on 127.0.0.1: as much of its HTTP interface as reading files through fsspec needs."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.loopback import QuietRequests, serving

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class FakeDatasetHub:
    """``data_sets``: id -> its directory; ``tokens``: id -> the token it needs; ``refusals``: id -> what every request
    gets, as often as the number says."""

    url: str = ""
    revisions: tuple[str, ...] = ("main", "v1")
    data_sets: dict[str, Path] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    #: Bytes sent of each file, and requests by kind.
    num_bytes_sent: Counter[str] = field(default_factory=Counter)
    num_requests: Counter[str] = field(default_factory=Counter)

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Status, headers and body of a request."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts[0] != "datasets":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repo_id, rest = "/".join(parts[1:3]), parts[3:]
        self.num_requests["api" if is_api else "file"] += 1
        if repo_id in self.refusals and self.refusals[repo_id][0] > 0:
            number, status, code = self.refusals[repo_id]
            self.refusals[repo_id] = (number - 1, status, code)
            return status, {"X-Error-Code": code, "X-Error-Message": "no"}, b""
        directory = self.data_sets.get(repo_id)
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if directory is None or token != self.tokens.get(repo_id, token):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if len(rest) > 1 and rest[1] not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if is_api and rest[:1] == ["tree"]:
            return self._tree(directory, "/".join(rest[2:]), "recursive=True" in path or "recursive=true" in path)
        if is_api and rest[:1] == ["paths-info"]:
            wanted = json.loads(body)["paths"]
            return 200, {}, json.dumps([_entry(directory, directory / name) for name in wanted]).encode()
        if is_api:
            return 200, {}, json.dumps({"id": repo_id, "sha": "a" * 40, "siblings": []}).encode()
        return self._file(directory, "/".join(rest[2:]), headers.get("range", ""))

    def _tree(self, directory: Path, below: str, recursive: bool) -> Answer:
        root = directory / below
        if not root.is_dir():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        found = sorted(root.rglob("*") if recursive else root.iterdir())
        return 200, {}, json.dumps([_entry(directory, path) for path in found]).encode()

    def _file(self, directory: Path, name: str, asked: str) -> Answer:
        path = directory / name
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = path.read_bytes()
        if not asked:
            self.num_bytes_sent[name] += len(content)
            return 200, {}, content
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        piece = content[first : last + 1]
        self.num_bytes_sent[name] += len(piece)
        return 206, {"Content-Range": f"bytes {first}-{first + len(piece) - 1}/{len(content)}"}, piece


def _entry(directory: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(directory).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


@contextmanager
def serve() -> Iterator[FakeDatasetHub]:
    """A running hub without data sets; stopped at the end."""
    hub = FakeDatasetHub()

    class Requests(QuietRequests):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802 (http.server's name)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = hub.answer(
                self.path, {name.lower(): value for name, value in self.headers.items()}, body
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_POST = do_HEAD = do_GET  # noqa: N815

    with serving(Requests) as hub.url:
        yield hub
