"""Files mapped into memory, so that nothing is copied. They need not stay open, and may shrink.

Reading a map whose file was cut off, or whose disk fails, raises a signal that ends the process without a word, in
whatever thread happens to read, DALI's too. Here the missing part becomes zeros, and :func:`check` says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vimfast.errors import UserError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

_AHEAD_BYTES = 128 << 10  # the kernel reads no more than its window (128 KiB on most disks) for one request
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _SA_SIGINFO, _SA_NODEFER, _ADDRESS_IN_SIGINFO = 0x10, 4, 0x40000000, 16


class Map:
    """The bytes of a regular file, read-only.

    Args:
        keep_open: while there are open files to spare, which makes :meth:`will_need` quicker.

    Raises:
        OSError: the file cannot be opened or mapped.
        ValueError: it is empty, or not a regular file.
    """

    def __init__(self, path: Path, *, keep_open: bool = False) -> None:
        self._descriptor = -1
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or not found.st_size:
                raise ValueError("empty, or not a regular file")
            size = found.st_size
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _FAILED:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            # A new file has the lowest free number, so this leaves half of the limit to everybody else.
            if keep_open and descriptor < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
                self._descriptor = descriptor
                weakref.finalize(self, os.close, descriptor)
        finally:
            if self._descriptor < 0:
                os.close(descriptor)
        self._address = address
        _guard.add(address, size, path)
        held = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(held, _unmap, address, size).atexit = False  # DALI's threads may be reading still
        buffer: Any = held
        self.content: np.ndarray = np.frombuffer(buffer, np.uint8)
        self.content.flags.writeable = False

    def will_need(self, offset: int, size: int) -> None:
        """Ask for these bytes. On a cold disk the kernel then fetches the batches to come all at once, not page by
        page as each image is decoded. Python's own ``madvise`` would keep its lock while the disk's queue is full."""
        for start in range(offset, offset + size, _AHEAD_BYTES):
            length = min(_AHEAD_BYTES, offset + size - start)
            if self._descriptor >= 0:  # the same, and quicker than through ctypes
                os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)
            else:
                at = self._address + start
                page = at & -mmap.PAGESIZE
                _libc.madvise(page, at + length - page, mmap.MADV_WILLNEED)


def check() -> None:
    """Whether all that was read from maps was there; to be asked once it has been used. Quick.

    Raises:
        UserError: a file was cut off, or its disk failed; the sentence names it.
    """
    if _guard.lost is not None:
        raise UserError(
            f"{_guard.lost.path} could not be read to its end: it was cut off while it was in use, or its disk failed",
            "copy it again or run vimfast-prepare again, then resume",
        )


class _Region(NamedTuple):
    first: int
    end: int
    path: Path


class _Guard:
    """The handler of SIGBUS: what lies in a map becomes zeros, the rest goes to whoever handled it before."""

    def __init__(self) -> None:
        self.lost: _Region | None = None  # the last that lost something
        self.regions: dict[int, _Region] = {}
        self._lock = threading.Lock()
        self._before: ctypes.Array[ctypes.c_char] | None = None
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._handle)

    def add(self, address: int, size: int, path: Path) -> None:
        with self._lock:
            if self._before is None:
                self._install()
            self.regions[address] = _Region(address, address + size, path)

    def _install(self) -> None:
        """As glibc lays out ``struct sigaction``: the handler, 128 bytes of mask, the flags, the restorer."""
        pointer = ctypes.sizeof(ctypes.c_void_p)
        action = ctypes.create_string_buffer(pointer + 128 + 8 + pointer)
        before = ctypes.create_string_buffer(len(action))
        ctypes.c_void_p.from_buffer(action).value = ctypes.cast(self._handler, ctypes.c_void_p).value
        ctypes.c_int.from_buffer(action, pointer + 128).value = _SA_SIGINFO | _SA_NODEFER
        _libc.sigaction(signal.SIGBUS, action, before)
        self._before = before

    def _handle(self, number: int, info: int, context: int) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS_IN_SIGINFO).value or 0
        for region in list(self.regions.values()):
            if region.first <= address < region.end:
                page = address & -mmap.PAGESIZE
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                self.lost = region
                if _libc.mmap(page, region.end - page, mmap.PROT_READ, flags, -1, 0) != _FAILED:
                    return
        _libc.sigaction(number, self._before, None)  # the read is tried again, and ends as it would have


def _unmap(address: int, size: int) -> None:
    if _guard.lost is _guard.regions.pop(address, None):
        _guard.lost = None
    _libc.munmap(address, size)


_guard = _Guard()
