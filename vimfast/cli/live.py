"""A line that says what a command is doing, for work that has no bar."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

from vimfast.errors import one_line

_TICK = 1.0  # seconds
_CLEAR = "\r\033[K"


class LiveLine:
    """In its block, what is being done and for how long, on stderr if that is a terminal; nothing stays of it.

    A thread counts the seconds, so that a long step can be told from one that hangs. It writes past Python's streams,
    whose locks a process that is forked meanwhile would inherit.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._to = sys.stderr.fileno() if self._live else -1  # also where sys.stderr is another for a while
        self._what, self._since = "", time.monotonic()
        self._changed, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._tick, name="live line", daemon=True)

    def __enter__(self) -> LiveLine:
        if self._live:
            self._thread.start()
        return self

    def say(self, what: str) -> None:
        """This is what is done from now on."""
        self._what, self._since = one_line(what), time.monotonic()
        self._changed.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._changed.set()
        if self._live:
            self._thread.join()
            self._write("")

    def _tick(self) -> None:
        while not self._over:
            if self._what:
                seconds = time.monotonic() - self._since
                self._write(f"{f'{seconds:.0f} s: ' if seconds >= 1 else ''}{self._what} ...")
            self._changed.wait(_TICK)
            self._changed.clear()

    def _write(self, text: str) -> None:
        columns = shutil.get_terminal_size().columns
        with suppress(OSError):
            os.write(self._to, f"{_CLEAR}{text[: columns - 1]}".encode(errors="replace"))
