"""Serve a folder as a bucket of S3, for reading, as slowly as asked for: to measure and to try training from a store.

    python tools/object_server.py shards/ --rate 200 --latency 30

prints the environment with which ``--data-path s3://shards`` reads it. Requests are answered in threads, by sendfile;
signatures are not looked at, and there is no listing. A web server's URL (http://127.0.0.1:PORT/shards) works too.
"""

from __future__ import annotations

import argparse
import os
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vimfast.cli import run_main

_CHUNK = 256 << 10  # bytes between two looks at the clock


class Meter:
    """Bytes of all connections together, at so many a second."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._next, self._lock = rate, 0.0, threading.Lock()

    def wait(self, count: int) -> None:
        """Until so many more may be sent."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now - 0.1) + count / self._rate
            pause = self._next - now
        if pause > 0:
            time.sleep(pause)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD, of files and of ranges of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    meter: Meter
    latency: float  # seconds

    def do_GET(self) -> None:
        """The file, or a range of it."""
        self._answer(send=True)

    def do_HEAD(self) -> None:
        """Its size."""
        self._answer(send=False)

    def _answer(self, *, send: bool) -> None:
        time.sleep(self.latency)
        name = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]  # after the bucket
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            self.send_response_only(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if send else b"")
            return
        try:
            size = os.fstat(file).st_size
            start, end = 0, size
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
            self.send_response_only(206 if found else 200)
            for header, value in (
                ("Content-Length", str(end - start)),
                ("Content-Range", f"bytes {start}-{end - 1}/{size}" if found else ""),
                ("ETag", f'"{size}"'),
                ("Last-Modified", formatdate(os.fstat(file).st_mtime, usegmt=True)),
            ):
                if value:
                    self.send_header(header, value)
            self.end_headers()
            self.wfile.flush()
            while send and start < end:
                count = min(_CHUNK, end - start)
                self.meter.wait(count)
                start += os.sendfile(self.connection.fileno(), file, start, count)
        finally:
            os.close(file)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """Of a folder.

    Args:
        rate: bytes a second; None: as many as it can.
        latency: seconds before each answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int = 0, rate: float | None = None, latency: float = 0.0) -> None:
        own = {"folder": folder, "meter": Meter(rate), "latency": latency}
        super().__init__(("127.0.0.1", port), type("Handler", (Handler,), own))

    def handle_error(self, *_: object) -> None:
        """Clients may go away."""


def environment(port: int) -> dict[str, str]:
    """With which S3's clients find the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, help="MB a second, of all connections together")
    parser.add_argument("--latency", type=float, default=0.0, help="ms before each answer")
    args = parser.parse_args()
    rate = args.rate and args.rate * 1e6
    server = Server(args.folder, args.port, rate, args.latency / 1000)
    print("export", *(f"{name}={value}" for name, value in environment(server.server_port).items()), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_main(main)
