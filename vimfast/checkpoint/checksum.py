"""A checksum in a checkpoint file, over all its bytes.

A file of ``torch.save`` is a zip archive, whose CRCs torch writes and never reads. So a checkpoint ends with one more,
as the archive's comment, which every reader of such files skips. A file without it, of another program or an earlier
version, is verified by the CRCs of its records.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from vimfast.files import READ_BYTES

_ZIP = b"PK\x03\x04"
_MARK = b"vimfast crc32 "
_COMMENT = re.compile(re.escape(_MARK) + rb"[0-9a-f]{8}")
_COMMENT_BYTES = len(_MARK) + 8
_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")  # of the comment, as the archive's last field has it; 0 without one


class ChecksumWriter:
    """A file for ``torch.save``, which hides why a write failed: `error` is what the system said.

    Args:
        file: empty, and open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._crc = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._crc = zlib.crc32(data, self._crc)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Add the checksum, once the archive is complete."""
        self._file.seek(-len(_LENGTH), 2)
        self._file.write(_LENGTH + _comment(self._crc))


def find_damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None where they are as written, or nothing in the file can tell.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _COMMENT_BYTES, 0))
        comment = file.read()
        if _COMMENT.fullmatch(comment):
            crc = zlib.crc32(bytes(len(_LENGTH)), _crc32(file, size - _COMMENT_BYTES - len(_LENGTH)))
            found = file.read(len(_LENGTH)) + comment
            return None if found == _LENGTH + _comment(crc) else "its checksum does not match"
        file.seek(0)
        if file.read(len(_ZIP)) != _ZIP:
            return None  # a format without any checksum, or no checkpoint at all
    return _damaged_record(path)


def _damaged_record(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:  # ours, unless it is damaged
                return "its checksum is damaged"
            record = archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the parser raises nearly anything on garbage
        return " ".join(str(error).split()) or type(error).__name__
    return None if record is None else f"the checksum of {record} does not match"


def _comment(crc: int) -> bytes:
    return _MARK + b"%08x" % crc


def _crc32(file: BinaryIO, size: int) -> int:
    """Of the first `size` bytes; the file then stands behind them."""
    crc = 0
    file.seek(0)
    while size > 0 and (data := file.read(min(READ_BYTES, size))):
        crc = zlib.crc32(data, crc)
        size -= len(data)
    return crc
