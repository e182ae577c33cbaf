"""A model hub on 127.0.0.1: as much of its HTTP interface as ``huggingface_hub`` needs for a download."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.loopback import QuietRequests, serving


@dataclass
class FakeHub:
    """``repositories``: id -> its directory. ``refusals``: id -> (status, X-Error-Code) for every request.

    ``downloads`` are the files whose content was sent, in order.
    """

    url: str = ""
    commit: str = "a" * 40
    repositories: dict[str, Path] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)

    def answer(self, path: str, *, with_body: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET (or HEAD) request."""
        parts = path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        if repo_id in self.refusals:
            status, code = self.refusals[repo_id]
            return status, {"X-Error-Code": code, "X-Error-Message": code or "broken"}, b""
        directory = self.repositories.get(repo_id)
        if directory is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if len(rest) > 1 and rest[1] not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        names = sorted(file.name for file in directory.iterdir())
        if is_api and rest[:1] == ["tree"]:
            files = [self._tree_entry(directory / name) for name in names]
            return 200, {}, json.dumps(files).encode()
        if is_api:
            listing = {"id": repo_id, "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            return 200, {}, json.dumps(listing).encode()
        if rest[:1] != ["resolve"] or rest[-1] not in names:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = (directory / rest[-1]).read_bytes()
        if with_body:
            self.downloads.append(rest[-1])
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": self.commit}, content

    @staticmethod
    def _tree_entry(file: Path) -> dict[str, object]:
        content = file.read_bytes()
        return {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running hub without repositories; stopped at the end."""
    hub = FakeHub()

    class Requests(QuietRequests):
        def do_GET(self) -> None:  # noqa: N802 (http.server's name)
            self._send(with_body=True)

        def do_HEAD(self) -> None:  # noqa: N802 (http.server's name)
            self._send(with_body=False)

        def _send(self, *, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path, with_body=with_body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with serving(Requests) as hub.url:
        yield hub
