"""A server on loopback that answers with a handler of the test's own: ``with serving(Handler) as url``."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietRequests(BaseHTTPRequestHandler):
    """Answers without a line on stderr for each request."""

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (http.server's name)
        pass


@contextmanager
def serving(requests: type[QuietRequests]) -> Iterator[str]:
    """The server's URL, on a free port; it has ended when the block has."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), requests)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
