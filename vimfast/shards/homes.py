"""Where ImageNet's archives lie: in a folder of this machine, or in a store."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.files import read_at
from vimfast.shards.origin import MOST_BYTES, Origin, missing_sources, put_stat
from vimfast.shards.stored import StoreOrigin, store_at
from vimfast.stores import open_object

DOWNLOAD_AGAIN = "download it again, or compare its checksum with image-net.org's"
_HEADER_BYTES = 2048  # of a request for one; what tarfile reads before a header is part of it


class Home(Protocol):
    """Files side by side. It is sent to workers.

    Raises:
        OSError, UserError: a file cannot be read.
    """

    @property
    def at_once(self) -> int:
        """How many files a worker should read at a time."""

    def where(self, name: str) -> str:
        """A file is, for a person to find it."""

    def stamp(self, name: str) -> tuple[int, ...] | None:
        """What changes when the file does; None where there is none."""

    def read(self, name: str) -> bytes:
        """All of a file."""

    def open(self, name: str, *, headers: bool) -> BinaryIO:
        """A file that can seek.

        Args:
            headers: little is read, far apart; else all of it from the beginning on.
        """

    def origin(self, archive: str, names: Sequence[str], places: np.ndarray) -> Origin:
        """Members of an archive.

        Args:
            places: int64 [n, 2]: the first byte of each, and how many.
        """


def home_of(root: Path | str) -> Home:
    """A folder, or the URL of one."""
    return _Store(root) if isinstance(root, str) else _Folder(str(root))


class _Folder(NamedTuple):
    folder: str

    @property
    def at_once(self) -> int:
        return 1

    def where(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def stamp(self, name: str) -> tuple[int, ...] | None:
        if not os.path.isfile(self.where(name)):
            return None
        found = os.stat(self.where(name))
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def read(self, name: str) -> bytes:
        return Path(self.where(name)).read_bytes()

    def open(self, name: str, *, headers: bool) -> BinaryIO:
        return open(self.where(name), "rb", buffering=4096)

    def origin(self, archive: str, names: Sequence[str], places: np.ndarray) -> Origin:
        return ArchiveOrigin(self.where(archive), names, places)


class _Store(NamedTuple):
    url: str

    @property
    def at_once(self) -> int:
        return 64  # of which each waits some 30 ms for a header

    def where(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def stamp(self, name: str) -> tuple[int, ...] | None:
        found = store_at(self.url).find(name)
        return None if found is None else (found.bytes,)

    def read(self, name: str) -> bytes:
        return store_at(self.url).read(name)

    def open(self, name: str, *, headers: bool) -> BinaryIO:
        return open_object(store_at(self.url), name, *((_HEADER_BYTES,) if headers else ()))

    def origin(self, archive: str, names: Sequence[str], places: np.ndarray) -> Origin:
        return StoredArchiveOrigin(self.url, archive, names, places)


class ArchiveOrigin:
    """Members of an archive, by their places.

    Args:
        places: int64 [n, 2]: the first byte of each, and how many.
    """

    def __init__(self, archive: str, names: Sequence[str], places: np.ndarray) -> None:
        self._archive, self._names, self._places = archive, names, places
        self._file: int | None = None

    def __getstate__(self) -> tuple[str, Sequence[str], np.ndarray]:
        return self._archive, self._names, self._places

    def __setstate__(self, state: tuple[str, Sequence[str], np.ndarray]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def name(self, i: int) -> str:
        return f"{self._archive}: {self._names[i]}"

    def stat(self) -> np.ndarray:
        sources = missing_sources(len(self._names))
        with suppress(OSError):  # reported when it is read
            put_stat(sources, os.stat(self._archive), self._places[:, 1])
        return sources

    def read(self, i: int) -> bytes:
        offset, size = self._places[i].tolist()
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes, which is more than {MOST_BYTES:,}")
        try:
            if self._file is None:
                self._file = os.open(self._archive, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._file)
            data = read_at(self._file, offset, size)
        except OSError as error:
            raise UserError(
                f"{self.name(i)} cannot be read ({error.strerror})", "once the archive is back, run again, it resumes"
            ) from None
        if len(data) < size:
            raise UserError(f"{self._archive} is cut off in {self._names[i]}", DOWNLOAD_AGAIN)
        return data


class StoredArchiveOrigin(StoreOrigin):
    """Members of an archive in a store, by their places.

    Args:
        url: of the folder that the archive is in.
        places: int64 [n, 2]: the first byte of each, and how many.
    """

    def __init__(self, url: str, archive: str, names: Sequence[str], places: np.ndarray) -> None:
        super().__init__(url, names, places[:, 1])
        self._archive, self._places = archive, places

    def __reduce__(self) -> tuple[type, tuple[str, str, Sequence[str], np.ndarray]]:
        return type(self), (self._url, self._archive, self._names, self._places)

    def name(self, i: int) -> str:
        return f"{self._url}/{self._archive}: {self._names[i]}"

    def _fetch(self, i: int) -> bytes:
        return store_at(self._url).read_range(self._archive, *self._places[i].tolist())
