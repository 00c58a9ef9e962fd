"""The bytes of picture i, from shards (memory-mapped, nothing copied) or straight from a folder tree.

Both hand out the same bytes for the same picture: what ``vimfast-prepare`` does once to an odd file (a PNG named
.JPEG, a CMYK JPEG), the folder source does in memory each time. So training works before conversion, and the same.
"""

from __future__ import annotations

import mmap
import os
import resource
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vimfast.data import index, jpeg, tree
from vimfast.errors import UserError

_TAR_BLOCK = 512


class Pictures(NamedTuple):
    """A batch of encoded pictures."""

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

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> Pictures:
        """The pictures of these ids (int64 [n]). Safe to call from several threads.

        Raises:
            UserError: a file is gone, cut off, or no picture; the sentence names it.
        """

    def name(self, i: int) -> str:
        """Where picture i lies, for a person to find it."""


def open_source(path: str | Path, split: str) -> Source:
    """The split ``"train"`` or ``"val"`` of a shards folder or a folder tree.

    A tree's validation labels are positions among its training classes where it has any, so a class without
    validation pictures does not shift those behind it.

    Raises:
        UserError: neither kind of folder, the conversion did not finish, the split is missing, or files are.
    """
    root = Path(path)
    if index.is_shards_folder(root):
        return ShardSource(root, split)
    classes = _class_folders(root / "train") if split != "train" else None
    return FolderSource(tree.scan_split(root, split, classes or None))


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


class ShardSource:
    """Pictures of one split of a shards folder: one mapped file a shard, opened when first read."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = index.read_manifest(folder)
        if split not in manifest["splits"]:
            raise UserError(
                f"{folder} holds no {split!r} split, only {', '.join(manifest['splits']) or 'none'}; "
                f"run vimfast-prepare on a folder that has {split}/"
            )
        described = manifest["splits"][split]
        self.classes: list[str] = manifest["classes"]
        self._index = index.read_index(folder, split, described["samples"])
        self._shards = [folder / shard["name"] for shard in described["shards"]]
        for path, shard in zip(self._shards, described["shards"], strict=True):
            _check_size(path, shard["bytes"])
        _allow_open_files(len(self._shards))
        self._maps: list[tuple[mmap.mmap, np.ndarray] | None] = [None] * len(self._shards)
        self.labels: np.ndarray = self._index["label"]

    def __len__(self) -> int:
        return len(self._index)

    def read(self, ids: np.ndarray) -> Pictures:
        rows = self._index[ids]
        places = zip(rows["shard"].tolist(), rows["offset"].tolist(), rows["size"].tolist(), strict=True)
        sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int32)
        return Pictures([self._picture(*place) for place in places], sizes, rows["label"].astype(np.int64))

    def _picture(self, shard: int, offset: int, size: int) -> np.ndarray:
        mapped, content = self._map(shard)
        if offset + size > len(content):
            raise UserError(
                f"{self._shards[shard]} ends before a picture that the index holds; run vimfast-prepare again"
            )
        # Off a cold disk the kernel then fetches a whole batch at once, not page by page as each one is decoded.
        start = offset - offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
        return content[offset : offset + size]

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        known = self._maps[shard]
        if known is None:
            path = self._shards[shard]
            try:
                with open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise UserError(f"{path} cannot be opened ({error.strerror}); run vimfast-prepare again") from None
            known = self._maps[shard] = (mapped, np.frombuffer(mapped, np.uint8))
        return known

    def name(self, i: int) -> str:
        """The tar and the member in it: ``train-000003.tar: n01440764/x.jpg``."""
        shard, offset = int(self._index["shard"][i]), int(self._index["offset"][i])
        header = self._map(shard)[1][offset - _TAR_BLOCK : offset].tobytes()
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            member = f"the picture at byte {offset}"
        return f"{self._shards[shard]}: {member}"


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it again or run vimfast-prepare again") from None
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, the manifest says {expected}; copy it again or run vimfast-prepare again"
        )


def _allow_open_files(count: int) -> None:
    """Python keeps a file open for each map, and 1,024 is a common limit that any process may raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class FolderSource:
    """Pictures of one split of a folder tree, read by a few threads."""

    def __init__(self, files: tree.FileList, threads: int = 8) -> None:
        self._files = files
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.classes: list[str] = files.classes
        self.labels: np.ndarray = files.labels

    def __len__(self) -> int:
        return len(self._files)

    def read(self, ids: np.ndarray) -> Pictures:
        shares = np.array_split(ids, self._threads)  # a task for each picture would cost as much as reading it
        read = [picture for share in self._pool.map(self._read_share, shares) for picture in share]
        sizes = np.array([size for _, size in read], np.int32).reshape(-1, 2)
        return Pictures([data for data, _ in read], sizes, self.labels[ids].astype(np.int64))

    def _read_share(self, ids: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
        return [self._picture(i) for i in ids.tolist()]

    def _picture(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        path = self._files.path(i)
        try:
            data = path.read_bytes()
            info = jpeg.inspect(data)
            if jpeg.is_plain(info) and info.complete:
                return np.frombuffer(data, np.uint8), (info.height, info.width)
            converted, size = jpeg.to_rgb_jpeg(data)  # of a plain one, only whether it decodes
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); check it with python -m vimfast.check_data"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is no readable picture ({error}); remove it, or convert with vimfast-prepare --skip-bad"
            ) from None
        return np.frombuffer(data if jpeg.is_plain(info) else converted, np.uint8), size

    def name(self, i: int) -> str:
        """The file's path."""
        return str(self._files.path(i))
