"""What is in a tar that somebody else wrote, of any kind that Python's tarfile reads, and where."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from vimfast.errors import UserError


def members(
    file: BinaryIO, what: str, fix: str, start: int = 0, size: int | None = None
) -> Iterator[tuple[str, int, int]]:
    """Of a tar, which may lie in another, the regular members: name, first byte in the file, and size in bytes.

    Only headers are read.

    Args:
        what: the tar is, and what to do where it is damaged: for the error.
        start, size: where it lies in the file; None: all of it from `start` on.

    Raises:
        UserError: it is no tar, is cut off, or has a name that leads out of it.
    """
    if size is None:
        size = file.seek(0, os.SEEK_END) - start
    try:
        window = _Window(file, start, size)
        with tarfile.open(fileobj=window, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                name = os.path.normpath(member.name)
                if member.issparse() or name.startswith(("/", "../")) or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"its member {member.name} lies outside of it")
                yield name, start + member.offset_data, member.size
            window.seek(tar.offset)
            end = window.read(tarfile.BLOCKSIZE)
            if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"at byte {start + tar.offset:,} is neither a header nor its end")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{what} is damaged ({error})", fix) from None


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        data = self._file.read(len(room))
        room[: len(data)] = data
        self._at += len(data)
        return len(data)
