"""What a store can do, whatever it is."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from vimfast.errors import UserError

QUIET = 5.0  # seconds for which a store that has not answered anything yet is asked again without a word
_READER_BYTES = 8 << 20  # of one request; with 30 ms until the first byte, larger ones gain little


class Entry(NamedTuple):
    """An object: its name below the store's URL, and its size in bytes."""

    name: str
    bytes: int


class Missing(UserError):
    """There is no such object, folder or bucket."""


class Store(Protocol):
    """A folder of a store. Names are relative to its URL, with slashes. Safe to use from several threads, but not in a
    process that was forked after the first request to any store (RuntimeError).

    Requests are repeated, with a growing pause, where the fault may pass: broken connections, time-outs, throttling.

    Raises:
        Missing: there is no such object.
        UserError: anything else; the sentence names the object and says what to do.
    """

    @property
    def url(self) -> str:
        """Without a slash at its end."""

    @property
    def lists(self) -> bool:
        """Whether it can say what objects it has; web servers cannot."""

    def entries(self, under: str = "") -> Iterator[Entry]:
        """All objects below the folder `under`, at any depth, in no particular order."""

    def find(self, name: str) -> Entry | None:
        """The object of this name; None where there is none."""

    def read(self, name: str) -> bytes:
        """All of an object."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; an object that ends before is an error."""

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object, in place of one of this name; it appears whole or not at all.

        Args:
            content: its bytes, or a local file that holds them.
        """

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""


def name_in(store: Store, name: str) -> str:
    """The URL of an object, as sentences have it."""
    return f"{store.url}/{name}" if name else store.url


def open_object(store: Store, name: str, buffer: int = _READER_BYTES) -> BinaryIO:
    """An object as a binary file that is read in requests of `buffer` bytes, and can seek.

    Raises:
        Missing: there is none.
        UserError: it cannot be read; also from the file's methods.
    """
    entry = store.find(name)
    if entry is None:
        raise missing(store, name)
    return io.BufferedReader(_Object(store, entry), buffer)


def tell_of_waiting(problem: str, seconds: float) -> None:
    """That a store has not answered anything yet: its address may be wrong, and minutes without a word are long."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on a machine
        print(f"warning: {problem}; it is asked again for up to {seconds:.0f} s", file=sys.stderr, flush=True)


def missing(store: Store, name: str) -> Missing:
    """For an object that has to be there."""
    return Missing(f"{name_in(store, name)} does not exist", "check the URL")


class _Object(io.RawIOBase):
    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._place = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._entry.bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"no place {start + offset} in a file")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed has a private type
        size = min(len(buffer), max(self._entry.bytes - self._place, 0))
        if size:
            memoryview(buffer)[:size] = self._store.read_range(self._entry.name, self._place, size)
            self._place += size
        return size
