"""The index of a split as a loader uses it: the rows of some images at a time.

A small index is read whole and checked before it is used. One of more than ``MOST_IN_MEMORY`` rows (ImageNet-21k's has
454 MB) stays in its file, where its rows are read as they are needed: a process then needs no memory for it, and every
process of a host finds it in the same pages of the system. Its checksum and all its rows are checked meanwhile, by a
thread; a row is checked by itself before it is handed out.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.files import open_regular, read_at
from vimfast.shards.format import INDEX_DTYPE, SplitEntry, index_header, index_name, read_index

MOST_IN_MEMORY = 1 << 22  # rows; 134 MB

_LARGEST_SIDE = 65535  # of a JPEG
_ROWS = 1 << 14  # what fits in a core's cache
_AGAIN = "copy it again or run vimfast-prepare again"


class Rows(Protocol):
    """Rows of ``INDEX_DTYPE``, of which there are as many as the split has images."""

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Those of some images, int64 [n].

        Raises:
            UserError: the index is damaged, or can no longer be read.
        """

    def labels(self) -> np.ndarray:
        """int32 [N]."""

    def counts(self) -> np.ndarray:
        """How many images each class has, int64 [classes]."""


def open_rows(folder: Path, split: str, entry: SplitEntry, classes: int) -> Rows:
    """The index of a split of a shards folder.

    Args:
        entry: what the manifest says of the split.
        classes: how many there are.

    Raises:
        UserError: it is missing, damaged, or other than the manifest says.
    """
    path = folder / index_name(split)
    if not stays_in_file(entry):
        return rows_in_memory(read_index(folder, split, entry.samples, entry.index_crc32), entry, classes, str(path))
    fix = f"copy it again, or rebuild it with vimfast-prepare --reindex {folder}"
    try:
        file = open_regular(path)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {what}", fix) from None
    except ValueError as error:
        raise UserError(f"{path} is {error}", fix) from None
    return rows_in_file(file, entry, classes, str(path), fix)


def stays_in_file(entry: SplitEntry) -> bool:
    """Whether the index is too large to be read whole."""
    return entry.samples > MOST_IN_MEMORY


def index_bytes(entry: SplitEntry) -> int:
    """The size of the index's file."""
    return len(index_header(entry.samples)) + entry.samples * INDEX_DTYPE.itemsize


def rows_in_file(file: int, entry: SplitEntry, classes: int, where: str, fix: str) -> Rows:
    """An index that stays in its file.

    Args:
        file: open; closed by what is returned.
        where: it is, for a person to find it.
        fix: what to do where it is damaged.

    Raises:
        UserError: it is other than the manifest says.
    """
    return _FileRows(file, entry, _Check(entry, classes, where, fix), where, fix)


def rows_in_memory(rows: np.ndarray, entry: SplitEntry, classes: int, where: str) -> Rows:
    """An index that has been read.

    Args:
        where: it is, for a person to find it.

    Raises:
        UserError: it is other than the manifest says.
    """
    check = _Check(entry, classes, where)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        check(part, np.arange(start, start + len(part)))
    return _MemoryRows(rows, classes)


class _Check:
    """Whether rows are what they can be, whatever their checksum; 20 ms for ImageNet.

    Raises:
        UserError: when it is called with rows that are not.
    """

    def __init__(self, entry: SplitEntry, classes: int, where: str, fix: str = _AGAIN) -> None:
        self.classes, self._where, self._fix = classes, where, fix
        self._firsts = np.cumsum([0, *(shard.samples for shard in entry.shards)])
        self._bytes = np.array([shard.bytes for shard in entry.shards], np.uint64)

    def __call__(self, rows: np.ndarray, ids: np.ndarray) -> None:
        if wrong := self._wrong(rows, ids):
            raise UserError(f"{self._where} is damaged: it {wrong}", self._fix)

    def _wrong(self, rows: np.ndarray, ids: np.ndarray) -> str | None:
        shards = np.searchsorted(self._firsts, ids, "right") - 1
        if not np.array_equal(rows["shard"], shards):
            return "assigns its samples to other shards than the manifest"
        label, height, width, sizes = rows["label"], rows["height"], rows["width"], rows["size"].astype(np.uint64)
        ends = self._bytes[shards]
        for wrong, what in (
            ((label < 0) | (label >= self.classes), f"a label that is not from 0 to {self.classes - 1}"),
            ((height - 1 >= _LARGEST_SIDE) | (width - 1 >= _LARGEST_SIDE), f"a side not from 1 to {_LARGEST_SIDE}"),
            ((sizes > ends) | (rows["offset"] > ends - np.minimum(sizes, ends)), "a place outside its tar"),
        ):
            if wrong.any():
                return f"has {what}, in sample {ids[int(np.argmax(wrong))]}"
        return None


class _MemoryRows:
    def __init__(self, rows: np.ndarray, classes: int) -> None:
        self._rows, self._classes = rows, classes

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._rows[ids]
        return rows

    def labels(self) -> np.ndarray:
        labels: np.ndarray = self._rows["label"]
        return labels

    def counts(self) -> np.ndarray:
        return np.bincount(self._rows["label"], minlength=self._classes)


class _FileRows:
    def __init__(self, file: int, entry: SplitEntry, check: _Check, where: str, fix: str) -> None:
        self._file, self._entry, self._check, self._where, self._fix = file, entry, check, where, fix
        weakref.finalize(self, os.close, file).atexit = False  # threads may be reading still
        self._header = index_header(entry.samples)
        if (size := os.fstat(file).st_size) != (expected := index_bytes(entry)):
            raise UserError(f"{where} has {size:,} bytes, not the {expected:,} of its samples", fix)
        if self._read(0, len(self._header)) != self._header:
            raise UserError(f"{where} is damaged: its header is another than the manifest's", fix)
        self._damage: UserError | None = None
        self._counts = np.zeros(check.classes, np.int64)
        self._thread = threading.Thread(target=self._check_all, name="check the index", daemon=True)
        self._thread.start()

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        if self._damage is not None:
            raise self._damage
        size, begin = INDEX_DTYPE.itemsize, len(self._header)
        rows = np.frombuffer(b"".join([self._read(begin + i * size, size) for i in ids.tolist()]), INDEX_DTYPE)
        self._check(rows, ids)
        return rows

    def labels(self) -> np.ndarray:
        self._wait()
        labels = np.empty(self._entry.samples, np.int32)
        for start, rows, _ in self._blocks():
            labels[start : start + len(rows)] = rows["label"]
        return labels

    def counts(self) -> np.ndarray:
        self._wait()
        return self._counts

    def _wait(self) -> None:
        self._thread.join()
        if self._damage is not None:
            raise self._damage

    def _check_all(self) -> None:
        try:
            checksum = zlib.crc32(self._header)
            for start, rows, data in self._blocks():
                checksum = zlib.crc32(data, checksum)
                self._check(rows, np.arange(start, start + len(rows)))
                self._counts += np.bincount(rows["label"], minlength=len(self._counts))
            if checksum != self._entry.index_crc32:
                wanted = self._entry.index_crc32
                raise UserError(
                    f"{self._where} is damaged: its checksum is {checksum}, the manifest says {wanted}", self._fix
                )
        except UserError as error:
            self._damage = error

    def _blocks(self) -> Iterator[tuple[int, np.ndarray, bytes]]:
        """All rows, some at a time: the first one's number, the rows, and their bytes."""
        for start in range(0, self._entry.samples, _ROWS):
            count = min(_ROWS, self._entry.samples - start)
            at = len(self._header) + start * INDEX_DTYPE.itemsize
            data = self._read(at, count * INDEX_DTYPE.itemsize)
            yield start, np.frombuffer(data, INDEX_DTYPE), data

    def _read(self, at: int, size: int) -> bytes:
        try:
            data = read_at(self._file, at, size)
        except OSError as error:
            raise UserError(f"{self._where} cannot be read ({error.strerror})", "fix its disk, then resume") from None
        if len(data) < size:
            raise UserError(f"{self._where} was cut off while it was in use", f"{self._fix}, then resume")
        return data
