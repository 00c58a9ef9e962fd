"""The bytes of image i, from shards or straight from a folder tree.

Both hand out the same bytes for the same image: what ``vimfast-prepare`` does once to an odd file (a PNG named
.JPEG, a CMYK JPEG), the folder source does in memory each time. So training works before conversion, and the same.
"""

from __future__ import annotations

import functools
import tarfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vimfast.data.cache import CacheSettings
from vimfast.data.remote import remote_tars
from vimfast.data.remote_rows import remote_rows
from vimfast.data.tars import LocalTars, Place, Route, Tars
from vimfast.errors import UserError
from vimfast.shards import jpeg
from vimfast.shards.format import (
    Manifest,
    SplitEntry,
    fetch_manifest,
    is_shards_folder,
    read_manifest,
)
from vimfast.shards.origin import read_image
from vimfast.shards.rows import Rows, open_rows
from vimfast.shards.tree import FileList, class_folders, scan_split
from vimfast.stores import is_url, open_store

_TAR_BLOCK = 512

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

    def class_counts(self) -> np.ndarray:
        """How many images each class has, int64 [classes]; of a large set found without :attr:`labels`."""

    @property
    def identity(self) -> str:
        """Names the images and their numbering: of shards by their index, of a folder by its list of files."""

    @property
    def mixture(self) -> tuple[tuple[int, int], ...]:
        """Of several data sets, how many images each has and how many positions of an epoch; else empty."""

    def __len__(self) -> int: ...

    @property
    def widest_window(self) -> int | None:
        """The most shards to be read together, where not all of them can be here at a time; None: any number."""

    def follow(self, route: Route, epoch: int, step: int) -> None:
        """This step is read next, then those that follow it on the route: a store's shards are fetched by that."""

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


def open_source(path: str | Path, split: str, cache: CacheSettings | None = None) -> Source:
    """The split ``"train"`` or ``"val"`` of a shards folder, here or in a store, or of a folder tree.

    A tree's validation labels are positions among its training classes where it has any, so a class without
    validation images does not shift those after it.

    Args:
        path: a folder, or the URL of a shards folder.
        cache: where the shards of a store are kept; None: as :class:`CacheSettings` says.

    Raises:
        UserError: neither kind of folder, the conversion did not finish, the split is missing, or files are.
    """
    if isinstance(path, str) and is_url(path):
        return _open_url(path, split, cache or CacheSettings())
    root = Path(path)
    if is_shards_folder(root):
        return _open_folder(root, split)
    classes = class_folders(root / "train") if split != "train" else None
    return FolderSource(scan_split(root, split, classes or None))


def _open_folder(folder: Path, split: str) -> ShardSource:
    manifest = read_manifest(folder)
    entry = _entry(manifest, split, str(folder))
    tars = LocalTars(folder, [(shard.name, shard.bytes) for shard in entry.shards])
    return ShardSource(manifest.classes, entry, open_rows(folder, split, entry, len(manifest.classes)), tars)


def _open_url(url: str, split: str, cache: CacheSettings) -> ShardSource:
    store = open_store(url)
    manifest = fetch_manifest(store)
    entry = _entry(manifest, split, store.url)
    rows = remote_rows(store, manifest, split, cache)
    return ShardSource(manifest.classes, entry, rows, remote_tars(store, manifest, split, rows, cache))


def _entry(manifest: Manifest, split: str, where: str) -> SplitEntry:
    if split not in manifest.splits:
        raise UserError(
            f"{where} holds no {split!r} split, only {', '.join(manifest.splits) or 'none'}",
            f"run vimfast-prepare on a folder that has {split}/",
        )
    return manifest.splits[split]


class ShardSource:
    """Images of one split of shards.

    Args:
        classes: class names.
        entry: what the manifest says of the split.
        rows: of its index.
        tars: where their bytes are.
    """

    mixture = ()

    def __init__(self, classes: list[str], entry: SplitEntry, rows: Rows, tars: Tars) -> None:
        self.classes = classes
        self.identity = f"shards {entry.samples} {entry.index_crc32:08x}"
        self.tars = tars
        self._rows = rows
        self._firsts = np.cumsum([0, *(shard.samples for shard in entry.shards)])
        self._verified = np.zeros(entry.samples, bool)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self._rows.labels()

    def class_counts(self) -> np.ndarray:
        return self._rows.counts()

    def __len__(self) -> int:
        return len(self._verified)

    @property
    def widest_window(self) -> int | None:
        return self.tars.widest_window

    def follow(self, route: Route, epoch: int, step: int) -> None:
        self.tars.follow(route, epoch, step)

    def will_need(self, ids: np.ndarray) -> None:
        self.tars.will_need(_places(self._rows[np.unique(ids)]))

    def read(self, ids: np.ndarray) -> Images:
        rows = self._rows[ids]
        places = _places(rows)
        encoded = [np.frombuffer(data, np.uint8) for data in self.tars.read(places)]
        # At first; then they come from memory, or from a disk that was right before.
        for place in np.flatnonzero(~self._verified[ids]).tolist():
            if zlib.crc32(encoded[place].data) != rows["crc32"][place]:
                encoded[place] = np.frombuffer(self.tars.read_again(places[place]), np.uint8)
                self.verify(ids[place : place + 1], [encoded[place]])
        self._verified[ids] = True
        sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int32)
        return Images(encoded, sizes, rows["label"].astype(np.int64))

    def verify(self, ids: np.ndarray, encoded: Sequence[np.ndarray]) -> None:
        for i, data, stored in zip(ids.tolist(), encoded, self._rows[ids]["crc32"].tolist(), strict=True):
            if zlib.crc32(data.data) != stored:
                raise UserError(f"{self.name(i)} is damaged: it differs from its checksum in the index", _RESUME)

    def mean_bytes(self) -> float:
        """Of an image, from a few of them; 0 where there is none."""
        return float(self._rows[_few(len(self))]["size"].mean()) if len(self) else 0.0

    def bounds(self) -> tuple[int, ...]:
        """The first image of each shard, and the number of all images."""
        return tuple(self._firsts.tolist())

    def name(self, i: int) -> str:
        """The tar and the member in it: ``train-000003.tar: n01440764/x.jpg``."""
        ((shard, offset, _),) = _places(self._rows[np.array([i])])
        try:
            (header,) = self.tars.read([Place(shard, offset - _TAR_BLOCK, _TAR_BLOCK)])
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            member = f"the image at byte {offset}"
        return f"{self.tars.name(shard)}: {member}"


def _places(rows: np.ndarray) -> list[Place]:
    return list(map(Place, rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist()))


class FolderSource:
    """Images of one split of a folder tree, read by a few threads, or by many where the files are slow to come."""

    mixture = ()

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

    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.classes))

    @property
    def widest_window(self) -> int | None:
        return None

    def follow(self, route: Route, epoch: int, step: int) -> None:
        """Nothing: files are here."""

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
