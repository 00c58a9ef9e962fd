"""Where the images of a shard come from, as its writer asks for them: here, from the files of a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.files import read_file

MOST_BYTES = 1 << 30  # of an image's file: beyond any, and below what an index can hold

# What opening a file answers when the fault may be the file's own. Other errors (a network file system that went away)
# would hit the next file as well and must not empty the data set under --skip-bad. Nor must these, where the file's
# folder cannot be listed any more either: a link's disk that is gone, a ticket that has expired.
_FILE_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP})

# One row for each source file of a shard, whether it was kept or skipped: what a later run compares. `size` is -1 for
# one that is not there; `crc32` is of the whole file where `read` says that it could be read. The time of the last
# change, `ctime`, is there because what brings back a damaged file often brings back its `mtime` too.
SOURCE_DTYPE = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("ctime", "<i8"), ("crc32", "<u4"), ("read", "?")])


class Origin(Protocol):
    """The source files of one shard, in its order. It is sent to the worker that reads them."""

    def name(self, i: int) -> str:
        """Where file i is, for a person to find it."""

    def stat(self) -> np.ndarray:
        """Sizes in bytes and times in nanoseconds, as rows of ``SOURCE_DTYPE``."""

    def read(self, i: int) -> bytes:
        """The bytes of file i.

        Raises:
            ValueError: they cannot be read, and the file itself is at fault.
            UserError: they cannot, and it is more than that.
        """


class FolderOrigin:
    """Files below a folder.

    Args:
        names: their paths, relative to `folder`.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def name(self, i: int) -> str:
        return os.path.join(self._folder, self._names[i])

    def stat(self) -> np.ndarray:
        sources = missing_sources(len(self._names))
        for i, name in enumerate(self._names):
            with suppress(OSError):  # reported when it is read
                put_stat(sources[i : i + 1], os.stat(f"{self._folder}/{name}"))
        return sources

    def read(self, i: int) -> bytes:
        return read_source(Path(self._folder, self._names[i]))


def missing_sources(count: int) -> np.ndarray:
    """So many rows of ``SOURCE_DTYPE``, of files that are not there."""
    sources = np.zeros(count, SOURCE_DTYPE)
    sources["size"] = -1
    return sources


def put_stat(rows: np.ndarray, stat: os.stat_result, sizes: Iterable[int] | int | None = None) -> None:
    """Size and times of a file into rows of ``SOURCE_DTYPE``.

    Args:
        sizes: of what is in the file, for a row each; None: the file's.
    """
    rows["size"] = stat.st_size if sizes is None else sizes
    rows["mtime"], rows["ctime"] = _in_range(stat.st_mtime_ns), _in_range(stat.st_ctime_ns)


def _in_range(nanoseconds: int) -> int:
    """Of a time beyond the year 2262 or before 1677, a number that stands for it."""
    return (nanoseconds + 2**63) % 2**64 - 2**63


def read_image(path: Path) -> bytes:
    """The bytes of an image's file.

    Raises:
        ValueError: not a regular file, or larger than an image can be; the message says so.
        OSError: it cannot be read.
    """
    return read_file(path, most=MOST_BYTES)


def read_source(path: Path) -> bytes:
    """The bytes of an image's file.

    Raises:
        ValueError: they cannot be read, and the file itself is at fault.
        UserError: they cannot, and it is more than that.
    """
    try:
        return read_image(path)
    except OSError as error:
        if (error.errno in _FILE_ERRORS or path.is_symlink()) and _can_list(path):
            raise ValueError(f"cannot be opened: {error.strerror}") from None
        raise UserError(
            f"{path} cannot be read ({error.strerror})", "once the source folder is back, run again, it resumes"
        ) from None


def _can_list(path: Path) -> bool:
    """Whether the folder can be listed that a file, or what it is a link to, would be in."""
    try:
        with os.scandir(os.path.dirname(os.path.realpath(path))):
            return True
    except OSError:
        return False
