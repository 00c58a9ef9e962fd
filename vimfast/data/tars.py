"""The tars of a shards folder on this machine, read in place."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.files import read_at

_AHEAD_BYTES = 128 << 10  # the kernel reads no more than its window (128 KiB on most disks) for one request
_AGAIN = "copy it again or run vimfast-prepare again"
_RESUME = "copy it again or run vimfast-prepare again, then resume"


class Place(NamedTuple):
    """Where bytes lie: the number of a shard, and offset and size in its tar."""

    shard: int
    offset: int
    size: int


class Route(Protocol):
    """What all ranks together read, in order; :class:`~vimfast.data.order.Order` is one."""

    @property
    def by_shard(self) -> bool:
        """Whether few shards are read at a time, rather than all of them at once."""

    @property
    def endless(self) -> bool:
        """Whether another epoch follows each."""

    @property
    def length(self) -> int:
        """How many places for images an epoch has."""

    def drawn(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The places from `begin` to `end` that have images (of whoever asks), ascending, and the ids of those; both
        int64 [n]."""

    def drawn_before(self, step: int) -> int:
        """The first place of a step."""


class Tars(Protocol):
    """The tars of a split, wherever they lie. Safe to use from several threads.

    Raises:
        UserError: one cannot be read; the sentence names it.
    """

    @property
    def widest_window(self) -> int | None:
        """The most shards to be read together, where the next ones have to come while they are; None: any number."""

    def follow(self, route: Route, epoch: int, step: int) -> None:
        """This step is read next, then those that follow it on the route."""

    def will_need(self, places: Sequence[Place]) -> None:
        """These are read next but one: begin on them."""

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes of each place."""

    def read_again(self, place: Place) -> bytes:
        """Of a place whose bytes were not what was stored: from where they come from, if these were copies."""

    def name(self, shard: int) -> str:
        """Path or URL."""


class LocalTars:
    """Tars in a folder of this machine.

    Args:
        sizes: in bytes, by name.

    Raises:
        UserError: one is missing, cannot be opened, or has another size.
    """

    def __init__(self, folder: Path, sizes: Sequence[tuple[str, int]]) -> None:
        # A new file has the lowest free number, so this leaves half of the limit to everybody else.
        most = allow_open_files(len(sizes)) // 2
        self._tars: list[_Tar] = []
        kept: list[int] = []
        weakref.finalize(self, _close, kept).atexit = False  # threads may be reading still
        for name, size in sizes:
            self._tars.append(tar := _Tar(f"{folder}/{name}", size, most))
            if tar.kept is not None:
                kept.append(tar.kept)

    @property
    def widest_window(self) -> int | None:
        return None

    def follow(self, route: Route, epoch: int, step: int) -> None:
        """Nothing: they are here."""

    def will_need(self, places: Sequence[Place]) -> None:
        for shard, offset, size in places:
            self._tars[shard].will_need(offset, size)

    def read(self, places: Sequence[Place]) -> list[bytes]:
        return [self._tars[shard].read(offset, size) for shard, offset, size in places]

    def read_again(self, place: Place) -> bytes:
        return self._tars[place.shard].read(place.offset, place.size)

    def name(self, shard: int) -> str:
        return self._tars[shard].path


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


class _Tar:
    """One tar. It is read rather than mapped: a map whose file is cut off, or whose disk fails, ends the process with
    a signal and without a word, in whatever thread happens to decode.

    It is opened once and stays open, so that a run reads the tars that it began with whatever becomes of their names;
    where too few open files are allowed, it is opened for each image.

    A data set may have thousands, so this makes no more objects than it needs: no Path, no finalizer of its own.

    Args:
        most: the first number of an open file that is not kept.

    Raises:
        UserError: it cannot be read, or does not have its `size`.
    """

    __slots__ = ("kept", "path")

    def __init__(self, path: str, size: int, most: int) -> None:
        self.path = path
        self.kept: int | None = None
        file = self._open()
        if file < most:
            self.kept = file
        found = os.fstat(file)
        self._let_go(file)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a regular file", _AGAIN)
        if found.st_size != size:
            raise UserError(f"{path} has {found.st_size} bytes, the manifest says {size}", _AGAIN)

    def _open(self) -> int:
        if self.kept is not None:
            return self.kept
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing", _AGAIN) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror})", _opening(error)) from None

    def _let_go(self, file: int) -> None:
        if file != self.kept:
            os.close(file)

    def will_need(self, offset: int, size: int) -> None:
        """Ask for these bytes: a cold disk then fetches a batch at once, not image by image as they are read."""
        file = self._open()
        ask_ahead(file, offset, size)
        self._let_go(file)

    def read(self, offset: int, size: int) -> bytes:
        file = self._open()
        try:
            data = read_at(file, offset, size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})", _RESUME) from None
        finally:
            self._let_go(file)
        if len(data) < size:
            raise UserError(
                f"{self.path} was cut off while it was in use: it ends before byte {offset + size}", _RESUME
            )
        return data


def _opening(error: OSError) -> str:
    """What to do about a shard that cannot be opened."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "fix its permissions, or the disk" if error.errno in (errno.EACCES, errno.EPERM, errno.EIO) else _AGAIN


def ask_ahead(file: int, offset: int, size: int) -> None:
    """Have the disk fetch these bytes of an open file while something else is done."""
    with suppress(OSError):  # reported when it is read
        for start in range(offset, offset + size, _AHEAD_BYTES):
            os.posix_fadvise(file, start, min(_AHEAD_BYTES, offset + size - start), os.POSIX_FADV_WILLNEED)


def allow_open_files(count: int) -> int:
    """Raise the limit of open files for so many, as far as this process may (1,024 is common); the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        soft = max(soft, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
