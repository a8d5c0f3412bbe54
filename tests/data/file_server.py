"""An HTTP server on loopback that serves one file in all the ways that go wrong."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath


@dataclass
class Server:
    """What is served, and what was asked."""

    url: str
    """Of the folder; any name below it is the file."""
    content: bytes = b""
    tag: str | None = '"one"'
    ranges: bool = True
    honours_if_range: bool = True
    breaks: list[int] = field(default_factory=list)
    """The next answers are cut off after so many bytes of the body, one entry each."""
    statuses: list[int] = field(default_factory=list)
    """The next answers are these, before any other."""
    claims: int | None = None
    """Content-Length, whatever is sent."""
    slow: float = 0.0
    """Seconds before each 16 KiB."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By name, instead of `content`."""
    asked: list[str | None] = field(default_factory=list)
    """The Range header of every request."""
    sent: int = 0
    """Bytes of bodies."""


@contextmanager
def file_server(content: bytes = b"") -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_port}", content)
    http.state = server  # type: ignore[attr-defined]
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        server: Server = self.server.state  # type: ignore[attr-defined]
        asked = self.headers.get("Range")
        server.asked.append(asked)
        content = server.files.get(PurePosixPath(self.path).name, server.content)
        if server.statuses:
            self._answer(server.statuses.pop(0), b"trouble", {})
            return
        headers = {"ETag": server.tag} if server.tag else {}
        fresh = self.headers.get("If-Range") in (None, server.tag) or not server.honours_if_range
        if asked and server.ranges and fresh:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], headers)
        else:
            self._answer(200, content, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        import time

        server: Server = self.server.state  # type: ignore[attr-defined]
        self.close_connection = True
        self.send_response(status)
        length = server.claims if server.claims is not None and status in (200, 206) else len(body)
        for name, value in {"Content-Length": str(length), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if status in (200, 206) and server.breaks:
            body = body[: server.breaks.pop(0)]
        with suppress(ConnectionError):
            for start in range(0, len(body), 1 << 14):
                time.sleep(server.slow)
                piece = body[start : start + (1 << 14)]
                server.sent += len(piece)  # before, so that it is counted when the client has it
                self.wfile.write(piece)
