"""An S3 server on loopback, behind a proxy that can break: for tests of reading and writing in object storage.

with object_storage() as storage:
    storage.put("pool/00000.tar", data)
    place = storage.place("pool/00000.tar")     # a UPath with its own settings
    storage.break_next(1, kind="drop")          # the next answer is cut off in the middle
    monkeypatch.setenv(...) from storage.environment, then UPath(storage.url("pool/00000.tar"))
"""

import http.client
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from unittest import mock
from urllib.parse import urlsplit

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host"}
Kind = Literal["drop", "503"]


@dataclass
class Storage:
    """A running server with one empty bucket, `BUCKET`."""

    endpoint: str
    """URL of the proxy, which every request passes."""
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path and bytes of the answer's body, for every request that was not broken."""
    broken: list[str] = field(default_factory=list)
    """Method and path of every request that was."""
    _to_break: list[tuple[Kind, str | None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What a person would set; with few retries, so that tests of lasting trouble are quick."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_MAX_ATTEMPTS": "2"}

    def url(self, key: str) -> str:
        """`s3://…` of a key in the bucket."""
        return f"s3://{BUCKET}/{key}"

    def place(self, key: str, **options: Any) -> Any:
        """A UPath that needs no environment; `options` are s3fs's."""
        from upath import UPath

        return UPath(
            self.url(key),
            endpoint_url=self.endpoint,
            key="testing",
            secret="testing",
            config_kwargs={"retries": {"max_attempts": 1}},
            **options,
        )

    def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        self.place(key).fs.pipe_file(f"{BUCKET}/{key}", data)

    def break_next(self, n: int, kind: Kind = "drop", method: str | None = None) -> None:
        """Break the next `n` requests (of that method): cut the answer's body in half, or answer 503.

        A request that has a body itself (a PUT) is dropped before it reaches the server.
        """
        with self._lock:
            self._to_break = [(kind, method)] * n

    def _breaks(self, method: str) -> Kind | None:
        with self._lock:
            if self._to_break and self._to_break[0][1] in (None, method):
                return self._to_break.pop(0)[0]
            return None


@contextmanager
def object_storage() -> Iterator[Storage]:
    """Run the server and the proxy; credentials and region are in the environment meanwhile."""
    import requests
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with mock.patch.dict(os.environ, KEYS):
        server.start()
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
        host, port = server.get_host_and_port()
        storage = Storage(f"http://127.0.0.1:{proxy.server_port}")
        proxy.storage, proxy.server = storage, (host, port)  # type: ignore[attr-defined]
        proxy.daemon_threads = True
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        S3FileSystem.clear_instance_cache()  # else one of an earlier server may be found under the same settings
        try:
            requests.post(f"http://{host}:{port}/moto-api/reset", timeout=400)  # its state outlives a server
            storage.place("").fs.mkdir(BUCKET)
            yield storage
        finally:
            S3FileSystem.clear_instance_cache()
            proxy.shutdown()
            proxy.server_close()
            server.stop()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Silent."""

    def _relay(self) -> None:
        storage: Storage = self.server.storage  # type: ignore[attr-defined]
        kind = storage._breaks(self.command)
        body = self._body()
        if kind is not None:
            storage.broken.append(f"{self.command} {self.path}")
        if kind == "503":
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        if kind == "drop" and body:
            self.close_connection = True
            return
        status, headers, answer, length = self._ask(body)
        headers["Content-Length"] = length
        if kind == "drop":
            answer = answer[: len(answer) // 2]
            self.close_connection = True
        else:
            storage.requests.append((self.command, self.path, len(answer)))
        with suppress(ConnectionError):
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes, str]:
        """Status, headers, body and the stated length (a HEAD's answer has a length and no body)."""
        connection = http.client.HTTPConnection(*self.server.server)  # type: ignore[attr-defined]
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        headers["Host"] = urlsplit(self.server.storage.endpoint).netloc  # type: ignore[attr-defined]  # it is signed
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
        length = response.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(answer))
        return response.status, kept, answer, length

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
