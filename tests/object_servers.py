"""Real object stores on loopback: moto's S3 server as a process, and a proxy before it that makes trouble."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "bucket"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Trouble:
    """What happens to the next `times` requests (-1: to all) whose path ends with `name`.

    Args:
        status, body: answer this instead.
        cut: of the answer's body, only so many bytes come before the connection breaks.
        flip: change this byte of the body.
        delay: seconds before the answer.
        until: the answer waits for this.
    """

    name: str = ""
    times: int = -1
    status: int = 0
    body: bytes = b""
    cut: int | None = None
    flip: int | None = None
    delay: float = 0.0
    until: threading.Event | None = None

    def meets(self, path: str) -> bool:
        if self.times == 0 or not path.partition("?")[0].endswith(self.name):
            return False
        self.times -= 1
        return True


@dataclass
class Proxy:
    """What came through it, and what it does."""

    url: str
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    signatures: list[str] = field(default_factory=list)  # the header of the same requests

    def asked(self, name: str) -> int:
        """GETs of an object."""
        return sum(method == "GET" and path.endswith(name) for method, path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: str
    lock: threading.Lock

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            self.proxy.requests.append((self.command, self.path, self.headers.get("Range", "")))
            self.proxy.signatures.append(self.headers.get("Authorization", ""))
            trouble = next((one for one in self.proxy.troubles if one.meets(self.path)), Trouble())
        time.sleep(trouble.delay)
        if trouble.until is not None:
            trouble.until.wait()
        if trouble.status:
            return self._answer(trouble.status, {}, trouble.body)
        there = http.client.HTTPConnection(self.upstream, timeout=30)
        there.request(self.command, self.path, body, dict(self.headers))
        reply = there.getresponse()
        content = bytearray(reply.read())
        there.close()
        if trouble.flip is not None and len(content) > trouble.flip:
            content[trouble.flip] ^= 1
        return self._answer(reply.status, dict(reply.getheaders()), bytes(content), trouble.cut)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that went away are part of the tests."""


@contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    """A proxy to ``host:port``."""
    proxy = Proxy("")
    own = {"proxy": proxy, "upstream": upstream, "lock": threading.Lock()}
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), own))
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield proxy
    server.shutdown()
    server.server_close()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's, with an empty bucket; ``host:port``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Until it is."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not ready after {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """``host:port`` of an S3 server that all tests of a process share."""
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy before it, and the environment that leads there."""
    with proxy_to(moto) as proxy:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


def environment(endpoint: str) -> dict[str, str]:
    """For clients of an S3 server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
