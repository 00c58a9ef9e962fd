"""The bytes of image i, from shards or straight from a folder tree.

Both hand out the same bytes for the same image: what ``vimfast-prepare`` does once to an odd file (a PNG named
.JPEG, a CMYK JPEG), the folder source does in memory each time. So training works before conversion, and the same.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import tarfile
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vimfast.errors import UserError
from vimfast.shards import jpeg
from vimfast.shards.format import check_rows, index_name, is_shards_folder, read_index, read_manifest
from vimfast.shards.tree import FileList, class_folders, read_image, scan_split

_TAR_BLOCK = 512
_AHEAD_BYTES = 128 << 10  # the kernel reads no more than its window (128 KiB on most disks) for one request

# A thread spends most of a file that is in memory inside Python, so more than two only wait for each other; a file
# that is not waits for the disk or the network, and there many can. In seconds per image, over a batch.
_FAST, _SLOW = 70e-6, 100e-6
_FEWEST_READERS, _MOST_READERS = 2, 32

_MEMORY = "free some, or run with fewer --num-workers"
_AGAIN = "copy it again or run vimfast-prepare again"
_RESUME = "copy it again or run vimfast-prepare again, then resume"


class BadImage(UserError):
    """A file that holds no image, or a broken one. `image` is its id, `found` says where it is and what is wrong."""

    def __init__(self, image: int, found: str) -> None:
        super().__init__(
            found, "remove it, or leave such images out with --on-bad-image skip or vimfast-prepare --skip-bad"
        )
        self.image, self.found = image, found


class Images(NamedTuple):
    """A batch of encoded images."""

    encoded: list[np.ndarray]  # n arrays of uint8, each a JPEG; read-only
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

    def will_need(self, ids: np.ndarray) -> None:
        """Have the disk begin on the images of these ids (int64 [n]), which are read next."""

    def read(self, ids: np.ndarray) -> Images:
        """The images of these ids (int64 [n]). Safe to call from several threads.

        Raises:
            BadImage: a file is not an image, or is cut off; the sentence names it.
            UserError: a file is gone or cannot be read, which may have nothing to do with the image in it.
        """

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        """Look whether these images, of these ids, are what was stored, if that is known.

        Raises:
            UserError: one is not, so it is not the image that is bad, but its disk or the copy of its file.
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
    classes = class_folders(root / "train") if split != "train" else None
    return FolderSource(scan_split(root, split, classes or None))


class ShardSource:
    """Images of one split of a shards folder."""

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
        _allow_open_files(len(entry.shards))
        self._shards = [_Shard(folder / shard.name, shard.bytes) for shard in entry.shards]
        self.labels: np.ndarray = self._index["label"]
        self.identity = f"shards {entry.samples} {entry.index_crc32:08x}"
        self._verified = np.zeros(len(self._index), bool)

    def __len__(self) -> int:
        return len(self._index)

    def will_need(self, ids: np.ndarray) -> None:
        for number, offset, size in _places(self._index[np.unique(ids)]):
            self._shards[number].will_need(offset, size)

    def read(self, ids: np.ndarray) -> Images:
        rows = self._index[ids]
        encoded = [
            np.frombuffer(self._shards[number].read(offset, size), np.uint8) for number, offset, size in _places(rows)
        ]
        # At first; then they come from memory, or from a disk that was right before.
        fresh = np.flatnonzero(~self._verified[ids])
        self.verify(ids[fresh], [encoded[place] for place in fresh.tolist()])
        self._verified[ids] = True
        sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int32)
        return Images(encoded, sizes, rows["label"].astype(np.int64))

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        for i, data, stored in zip(ids.tolist(), encoded, self._index["crc32"][ids].tolist(), strict=True):
            if zlib.crc32(data.data) != stored:
                raise UserError(f"{self.name(i)} is damaged: it differs from its checksum in the index", _RESUME)

    def mean_bytes(self) -> float:
        """Of an image, from a few of them; 0 where there is none."""
        return float(self._index["size"][_few(len(self))].mean()) if len(self) else 0.0

    def bounds(self) -> tuple[int, ...]:
        """The first image of each shard, and the number of all images."""
        shards = np.arange(len(self._shards) + 1)
        return tuple(np.searchsorted(self._index["shard"], shards).tolist())

    def name(self, i: int) -> str:
        """The tar and the member in it: ``train-000003.tar: n01440764/x.jpg``."""
        shard, offset = self._shards[int(self._index["shard"][i])], int(self._index["offset"][i])
        try:
            header = shard.read(offset - _TAR_BLOCK, _TAR_BLOCK)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            member = f"the image at byte {offset}"
        return f"{shard.path}: {member}"


def _places(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Shard, offset and size of each."""
    return zip(rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist(), strict=True)


class _Shard:
    """One tar. It is read rather than mapped: a map whose file is cut off, or whose disk fails, ends the process with
    a signal and without a word, in whatever thread happens to decode.

    It is opened once and stays open, so that a run reads the tars that it began with whatever becomes of their names;
    where too few open files are allowed, it is opened for each image.

    Raises:
        UserError: it cannot be read, or does not have its `size`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._kept: int | None = None
        file = self._open()
        # A new file has the lowest free number, so this leaves half of the limit to everybody else.
        if file < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            self._kept = file
            weakref.finalize(self, os.close, file).atexit = False  # threads may be reading still
        found = os.fstat(file)
        self._let_go(file)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a regular file", _AGAIN)
        if found.st_size != size:
            raise UserError(f"{path} has {found.st_size} bytes, the manifest says {size}", _AGAIN)

    def _open(self) -> int:
        if self._kept is not None:
            return self._kept
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing", _AGAIN) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror})", _opening(error)) from None

    def _let_go(self, file: int) -> None:
        if file != self._kept:
            os.close(file)

    def will_need(self, offset: int, size: int) -> None:
        """Ask for these bytes: a cold disk then fetches a batch at once, not image by image as they are read."""
        file = self._open()
        with suppress(OSError):  # reported when it is read
            for start in range(offset, offset + size, _AHEAD_BYTES):
                os.posix_fadvise(file, start, min(_AHEAD_BYTES, offset + size - start), os.POSIX_FADV_WILLNEED)
        self._let_go(file)

    def read(self, offset: int, size: int) -> bytes:
        file = self._open()
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})", _RESUME) from None
        finally:
            self._let_go(file)
        if len(data) < size:
            raise UserError(
                f"{self.path} was cut off while it was in use: it ends before byte {offset + size}", _RESUME
            )
        return data


def _opening(error: OSError) -> str:
    """What to do about a shard that cannot be opened."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "fix its permissions, or the disk" if error.errno in (errno.EACCES, errno.EPERM, errno.EIO) else _AGAIN


def _allow_open_files(count: int) -> None:
    """1,024 is a common limit, which any process may raise."""
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

    def will_need(self, ids: np.ndarray) -> None:
        """Nothing: files are read by as many threads as their disk takes to be quick."""

    def read(self, ids: np.ndarray) -> Images:
        begin = time.perf_counter()
        shares = np.array_split(ids, self._readers)  # a task for each image would cost as much as reading it
        read = [image for share in self._pool.map(self._read_share, shares) for image in share]
        self._adapt((time.perf_counter() - begin) / max(len(ids), 1))
        sizes = np.array([size for _, size in read], np.int32).reshape(-1, 2)
        return Images([data for data, _ in read], sizes, self.labels[ids].astype(np.int64))

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        """Nothing is known of files."""

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
            data = read_image(path)
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
