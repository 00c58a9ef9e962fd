"""The bytes of image i, from shards (memory-mapped, nothing copied) or straight from a folder tree.

Both hand out the same bytes for the same image: what ``vimfast-prepare`` does once to an odd file (a PNG named
.JPEG, a CMYK JPEG), the folder source does in memory each time. So training works before conversion, and the same.
"""

from __future__ import annotations

import mmap
import os
import resource
import stat
import tarfile
import time
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.files import read_file
from vimfast.shards import jpeg
from vimfast.shards.format import check_rows, index_name, is_shards_folder, read_index, read_manifest
from vimfast.shards.tree import FileList, scan_split

_TAR_BLOCK = 512
_AHEAD_BYTES = 128 << 10  # the kernel reads no more than its window (128 KiB on most disks) for one request

# A thread spends most of a file that is in memory inside Python, so more than two only wait for each other; a file
# that is not waits for the disk or the network, and there many can. In seconds per image, over a batch.
_FAST, _SLOW = 70e-6, 100e-6
_FEWEST_READERS, _MOST_READERS = 2, 32

_MEMORY = "free some, or run with fewer --num-workers"
_AGAIN = "copy it again or run vimfast-prepare again"


class BadImage(UserError):
    """A file that holds no image, or a broken one. `image` is its id, `found` says where it is and what is wrong."""

    def __init__(self, image: int, found: str) -> None:
        super().__init__(
            found, "remove it, or leave such images out with --on-bad-image skip or vimfast-prepare --skip-bad"
        )
        self.image, self.found = image, found


class Images(NamedTuple):
    """A batch of encoded images."""

    encoded: list[np.ndarray]  # n arrays of uint8, each a JPEG; may be read-only views of a mapped file
    sizes: np.ndarray  # int32 [n, 2]: height, width in pixels
    labels: np.ndarray  # int64 [n]


class Source(Protocol):
    """One split of a data set."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is a position in this list."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]."""

    @property
    def identity(self) -> str:
        """Names the images and their numbering: of shards by their index, of a folder by its list of files."""

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> Images:
        """The images of these ids (int64 [n]). Safe to call from several threads.

        Raises:
            BadImage: a file is not an image, or is cut off; the sentence names it.
            UserError: a file is gone or cannot be read, which may have nothing to do with the image in it.
        """

    def name(self, i: int) -> str:
        """Where image i is, for a person to find it."""

    def mean_bytes(self) -> float:
        """Of an image, from a few of them; 0 where there is none."""

    def bounds(self) -> tuple[int, ...]:
        """The first image of each shard, and the number of all images.

        Raises:
            UserError: there are no shards.
        """


def open_source(path: str | Path, split: str) -> Source:
    """The split ``"train"`` or ``"val"`` of a shards folder or a folder tree.

    A tree's validation labels are positions among its training classes where it has any, so a class without
    validation images does not shift those after it.

    Raises:
        UserError: neither kind of folder, the conversion did not finish, the split is missing, or files are.
    """
    root = Path(path)
    if is_shards_folder(root):
        return ShardSource(root, split)
    classes = _class_folders(root / "train") if split != "train" else None
    return FolderSource(scan_split(root, split, classes or None))


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class ShardSource:
    """Images of one split of a shards folder: one mapped file per shard, opened when first read."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise UserError(
                f"{folder} holds no {split!r} split, only {', '.join(manifest.splits) or 'none'}",
                f"run vimfast-prepare on a folder that has {split}/",
            )
        entry = manifest.splits[split]
        self.classes: list[str] = manifest.classes
        self._index = read_index(folder, split, entry.samples, entry.index_crc32)
        if wrong := check_rows(self._index, entry, len(self.classes)):
            raise UserError(f"{folder / index_name(split)} is damaged: it {wrong}", _AGAIN)
        self._shards = [folder / shard.name for shard in entry.shards]
        for path, shard in zip(self._shards, entry.shards, strict=True):
            _check_size(path, shard.bytes)
        _allow_open_files(len(self._shards))
        self._opened: list[_Shard | None] = [None] * len(self._shards)
        self.labels: np.ndarray = self._index["label"]
        self.identity = f"shards {entry.samples} {entry.index_crc32:08x}"

    def __len__(self) -> int:
        return len(self._index)

    def read(self, ids: np.ndarray) -> Images:
        rows = self._index[ids]
        places = zip(rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist(), strict=True)
        sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int32)
        return Images([self._image(*place) for place in places], sizes, rows["label"].astype(np.int64))

    def _image(self, number: int, offset: int, size: int) -> np.ndarray:
        shard = self._shard(number)
        if offset + size > len(shard.content):
            raise UserError(
                f"{self._shards[number]} ends before an image that the index holds", "run vimfast-prepare again"
            )
        shard.read_ahead(offset, size)
        return shard.content[offset : offset + size]

    def _shard(self, number: int) -> _Shard:
        known = self._opened[number]
        if known is None:
            path = self._shards[number]
            try:
                known = self._opened[number] = _Shard(path)
            except OSError as error:
                raise UserError(f"{path} cannot be opened ({error.strerror})", "run vimfast-prepare again") from None
        return known

    def mean_bytes(self) -> float:
        """Of an image, from a few of them; 0 where there is none."""
        return float(self._index["size"][_few(len(self))].mean()) if len(self) else 0.0

    def bounds(self) -> tuple[int, ...]:
        """The first image of each shard, and the number of all images."""
        shards = np.arange(len(self._shards) + 1)
        return tuple(np.searchsorted(self._index["shard"], shards).tolist())

    def name(self, i: int) -> str:
        """The tar and the member in it: ``train-000003.tar: n01440764/x.jpg``."""
        shard, offset = int(self._index["shard"][i]), int(self._index["offset"][i])
        header = self._shard(shard).content[offset - _TAR_BLOCK : offset].tobytes()
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            member = f"the image at byte {offset}"
        return f"{self._shards[shard]}: {member}"


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.content = np.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_READ), np.uint8)

    def read_ahead(self, offset: int, size: int) -> None:
        """Ask for these bytes. On a cold disk the kernel then fetches the batches to come all at once, not page by
        page as each image is decoded. (``mmap.madvise`` asks the same, but keeps Python's lock while the disk's
        queue is full.)"""
        for start in range(offset, offset + size, _AHEAD_BYTES):
            os.posix_fadvise(self._file, start, min(_AHEAD_BYTES, offset + size - start), os.POSIX_FADV_WILLNEED)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing", _AGAIN) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", _AGAIN) from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file", _AGAIN)
    size = found.st_size
    if size != expected:
        raise UserError(f"{path} has {size} bytes, the manifest says {expected}", _AGAIN)


def _allow_open_files(count: int) -> None:
    """A map takes two open files, ours and Python's, and 1,024 is a common limit that any process may raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class FolderSource:
    """Images of one split of a folder tree, read by a few threads, or by many where the files are slow to come."""

    def __init__(self, files: FileList) -> None:
        self._files = files
        self._readers = _FEWEST_READERS
        self._pool = ThreadPoolExecutor(_MOST_READERS, thread_name_prefix="read")
        self.classes: list[str] = files.classes
        self.labels: np.ndarray = files.labels

    @property
    def identity(self) -> str:
        crc = 0
        for part in (self._files.labels, self._files.offsets, self._files.names):
            crc = zlib.crc32(part.data, crc)
        return f"folder {len(self)} {crc:08x}"

    def __len__(self) -> int:
        return len(self._files)

    def read(self, ids: np.ndarray) -> Images:
        begin = time.perf_counter()
        shares = np.array_split(ids, self._readers)  # a task for each image would cost as much as reading it
        read = [image for share in self._pool.map(self._read_share, shares) for image in share]
        self._adapt((time.perf_counter() - begin) / max(len(ids), 1))
        sizes = np.array([size for _, size in read], np.int32).reshape(-1, 2)
        return Images([data for data, _ in read], sizes, self.labels[ids].astype(np.int64))

    def _adapt(self, seconds: float) -> None:
        if seconds > _SLOW:
            self._readers = min(2 * self._readers, _MOST_READERS)
        elif seconds < _FAST:
            self._readers = max(self._readers // 2, _FEWEST_READERS)

    def _read_share(self, ids: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
        return [self._image(i) for i in ids.tolist()]

    def _image(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        path = self._files.path(i)
        try:
            data = read_file(path)
            info = jpeg.inspect(data)
            if jpeg.is_plain(info) and info.complete:
                return np.frombuffer(data, np.uint8), (info.height, info.width)
            converted, size = jpeg.to_rgb_jpeg(data)  # of a plain one, only whether it decodes
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror})", "check it with python -m vimfast.check_data"
            ) from None
        except ValueError as error:
            raise BadImage(i, f"{path} is not a readable image ({error})") from None
        except MemoryError:
            raise UserError(f"there is too little memory to decode {path}", _MEMORY) from None
        return np.frombuffer(data if jpeg.is_plain(info) else converted, np.uint8), size

    def mean_bytes(self) -> float:
        """Of an image, from a few of them; 0 where there is none. What cannot be looked at does not count."""
        sizes = []
        for i in _few(len(self)).tolist():
            with suppress(OSError):
                sizes.append(self._files.path(i).stat().st_size)
        return sum(sizes) / max(len(sizes), 1)

    def bounds(self) -> tuple[int, ...]:
        """No shards here.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"--order window reads a few shards at a time, and {self._files.folder} is a folder of images",
            "convert it with vimfast-prepare, or use --order permutation",
        )

    def name(self, i: int) -> str:
        """The file's path."""
        return str(self._files.path(i))


def _few(count: int) -> np.ndarray:
    """At most 64 ids, spread over all."""
    return np.linspace(0, count - 1, min(count, 64)).astype(np.int64)
