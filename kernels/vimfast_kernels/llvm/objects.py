"""Compiled kernels on the disk, so that a process need not compile what another has compiled before.

A file is a digest and an object file of ELF. Its name says what was compiled, by what, for which processor; the digest
is of that and of the object, so a damaged file, or one under another's name, is compiled again and written over.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vimfast_kernels.cache import cache_folder

_DIGEST = hashlib.sha256().digest_size


def kept(names: tuple[str, ...], compiled: Callable[[], bytes]) -> bytes:
    """What `compiled` returns, or has returned to a process before. Where nothing can be read or written, it is called.

    Args:
        names: all that the result depends on.
    """
    key = hashlib.sha256("\0".join(names).encode()).digest()
    try:
        path = cache_folder() / "llvm" / f"{key.hex()}.o"
    except RuntimeError:  # this user has no home
        return compiled()
    with suppress(OSError):
        if (found := _read(path, key)) is not None:
            return found
    made = compiled()
    with suppress(OSError):
        _write(path, hashlib.sha256(key + made).digest() + made)
    return made


def _read(path: Path, key: bytes) -> bytes | None:
    """The object; None if the file is damaged, or somebody else's, whose code is not to be run."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read() if os.fstat(file.fileno()).st_uid == os.geteuid() else b""
    made = data[_DIGEST:]
    return made if data[:_DIGEST] == hashlib.sha256(key + made).digest() else None


def _write(path: Path, data: bytes) -> None:
    """To a temporary file, then renamed: another process finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
