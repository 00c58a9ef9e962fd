"""Everything else that fsspec has a file system for: ``hf://``, ``sftp://``, ``memory://`` and dozens more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from vimfast.errors import UserError
from vimfast.files import TEMPORARY
from vimfast.stores.store import QUIET, Entry, Missing, missing, name_in, tell_of_waiting

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0  # seconds
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)
_Result = TypeVar("_Result")


class FilesystemStore:
    """A folder of one of fsspec's file systems."""

    lists = True

    def __init__(self, url: str, patience: float) -> None:
        self.url, self._patience = url, patience
        self._answered = False  # anything, as yet

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        scheme = self.url.partition("://")[0]
        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(f"{self.url} cannot be opened ({error})", "install what it names") from None
        except ValueError as error:
            known = f"fsspec knows no file system {scheme!r}" if "Protocol not known" in str(error) else str(error)
            raise UserError(f"{self.url} cannot be opened: {known}", "check the URL") from None
        return system, root.rstrip("/")

    def entries(self, under: str = "") -> Iterator[Entry]:
        """All objects below a folder."""
        system, root = self._opened
        system.invalidate_cache()
        found: dict[str, Any] = self._tried(under, lambda path: system.find(path, detail=True))
        for path, info in found.items():
            yield Entry(path[len(root) :].lstrip("/"), int(info["size"]))

    def find(self, name: str) -> Entry | None:
        """The object of this name; None where there is none."""
        system, _ = self._opened
        system.invalidate_cache()
        try:
            info = self._tried(name, system.info)
        except Missing:
            return None
        return Entry(name, int(info["size"])) if info["type"] == "file" else None

    def read(self, name: str) -> bytes:
        """All of an object."""
        return bytes(self._tried(name, self._opened[0].cat_file))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Part of an object."""
        system, _ = self._opened
        data = bytes(self._tried(name, lambda path: system.cat_file(path, start=offset, end=offset + size)))
        if len(data) != size:
            raise UserError(
                f"{name_in(self, name)} is too short: it ends before byte {offset + size}", "copy it to the store again"
            )
        return data

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object under a temporary name, then rename it."""
        system, _ = self._opened

        def write(path: str) -> None:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(content, Path):
                system.put_file(str(content), path + TEMPORARY)
            else:
                system.pipe_file(path + TEMPORARY, content)
            system.mv(path + TEMPORARY, path)

        self._tried(name, write, "written")

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        if self.find(name) is not None:
            self._tried(name, self._opened[0].rm_file, "removed")

    def _tried(self, name: str, ask: Callable[[str], _Result], done: str = "read") -> _Result:
        """Ask until there is an answer: fsspec leaves repeating to each file system, and few do it."""
        path = f"{self._opened[1]}/{name}" if name else self._opened[1]
        begin, pause = time.monotonic(), _FIRST_PAUSE
        silent = not self._answered
        while True:
            try:
                result = ask(path)
                self._answered = True
                return result
            except FileNotFoundError:
                self._answered = True
                raise missing(self, name) from None
            except Exception as error:  # of whatever library is behind the URL
                said = " ".join(str(error).split()) or type(error).__name__
                problem = f"{name_in(self, name)} cannot be {done} ({said})"
                if time.monotonic() + pause > begin + self._patience or isinstance(error, _FINAL):
                    fix = "check the address, the network and the credentials, then run again"
                    raise UserError(problem, fix) from None
            if silent and time.monotonic() > begin + QUIET:
                silent = False
                tell_of_waiting(problem, begin + self._patience - time.monotonic())
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
