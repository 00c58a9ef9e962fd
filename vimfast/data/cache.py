"""Files of a store on the local disk, shared by the processes of a machine and held to a size.

The only state is the files and their locks (flock), which the kernel lets go of when a process dies in whatever way:

- ``vimfast-cache/<key>/train-000003.tar`` is whole. Whoever reads it holds a shared lock on it; what nobody holds may
  be evicted.
- ``train-000003.tar.part`` is being fetched, by the process with the exclusive lock on it. Without one, that process
  was killed, and the next one begins it from the start.
- ``.lock`` is held while room is made, so that two processes do not count on the same room.

A file's time is when it was last taken up or let go of, and what was so the longest ago is evicted first.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vimfast.errors import UserError, remedy

_PART = ".part"
_OWN = "vimfast-cache"  # in a folder that may hold other things: all in it may be evicted
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CacheSettings:
    """Where the shards of a store are kept on this machine.

    Args:
        folder: on a disk of this machine; empty: ``$XDG_CACHE_HOME``, or ``~/.cache`` where that is not set or, as its
            specification says, is a relative path.
        size: the most bytes of files there; None: as much as the data takes; 0: nothing is kept, and images are read
            from the store one by one.
    """

    folder: str = ""
    size: int | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        home = os.environ.get("XDG_CACHE_HOME", "")
        return Path(self.folder or (home if os.path.isabs(home) else "~/.cache")).expanduser()


class NoRoom(Exception):
    """Nothing can be evicted. `disk` says that it is the disk that is full, and not the size that is reached."""

    def __init__(self, *, disk: bool) -> None:
        super().__init__("no space left on the disk" if disk else "the size of the cache is reached")
        self.disk = disk


class Held:
    """An open file of the cache, which stays there for as long as this object lives."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self) -> None:
        with suppress(OSError):
            os.utime(self.file)
        os.close(self.file)  # and with it the lock


class Download:
    """A file on its way into the cache: `file` is open for writing and has its room on the disk."""

    def __init__(self, file: int, path: Path) -> None:
        self.file, self._path = file, path

    def finish(self) -> Held:
        """It is whole."""
        fcntl.flock(self.file, fcntl.LOCK_SH)  # before it can be seen, so that nobody evicts it in between
        os.rename(_part(self._path), self._path)
        return Held(self.file)

    def abandon(self) -> None:
        """It is not going to be."""
        _part(self._path).unlink(missing_ok=True)
        os.close(self.file)


class Cache:
    """Files by names of the form ``<key>/<file>``.

    Args:
        folder: in which ``vimfast-cache`` is made, if need be, for the files of whatever data.
        size: the most bytes of files in it; None: no limit but the disk's.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """

    def __init__(self, folder: Path, size: int | None) -> None:
        self.folder, self.size = folder / _OWN, size
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            fix = remedy(error, "give a folder on a disk of this machine")
            raise UserError(f"--cache-dir {folder} cannot be used ({error.strerror})", fix) from None

    def hold(self, name: str) -> Held | None:
        """The file of this name, kept from being evicted; None where there is none."""
        path = self.folder / name
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        held = Held(file)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None  # just being evicted
        if not _is(file, path):
            return None
        with suppress(PermissionError):  # another user's
            os.utime(file)
        return held

    def begin(self, name: str, size: int) -> Download | None:
        """Begin to fetch a file; None where another process, or thread, has done so.

        Raises:
            NoRoom: for so many bytes.
            OSError: the disk has another fault.
        """
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        file = os.open(_part(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return None
            if path.exists() or not _is(file, _part(path)):  # the other one has finished since
                if _is(file, _part(path)):
                    _part(path).unlink()
                os.close(file)
                return None
            os.ftruncate(file, 0)
            self._reserve(file, size)
        except BaseException:
            with suppress(OSError):
                Download(file, path).abandon()
            raise
        return Download(file, path)

    def discard(self, name: str) -> None:
        """Forget a file: it is not what it should be. Whoever holds it can still read it."""
        (self.folder / name).unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes of all files, finished or not."""
        return sum(found.st_size for _, found in self._files())

    def _reserve(self, file: int, size: int) -> None:
        """Take room for so many bytes, before the first of them is written."""
        with self._alone():
            while self.size is not None and self.used() + size > self.size:
                if not self._evict():
                    raise NoRoom(disk=False)
            while True:
                try:
                    os.posix_fallocate(file, 0, size)
                    return
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                if not self._evict():
                    raise NoRoom(disk=True)

    def _evict(self) -> bool:
        """Remove what nobody holds and was last used the longest ago; whether there was anything."""
        for path, _ in sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns):
            with suppress(OSError):  # it is gone already
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is(file, path):
                        path.unlink()
                        return True
                finally:
                    os.close(file)
        return False

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _is(file: int, path: Path) -> bool:
    """Whether this open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
