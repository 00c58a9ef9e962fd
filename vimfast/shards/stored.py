"""Images that lie in an object store, and shards that are written to one.

A shard for a store is written to a temporary folder first, by the same function as any, and then put into the store,
its record last. What a later run needs to know, the records, is fetched into a temporary folder, which then is as good
as the folder of a conversion on a disk.
"""

from __future__ import annotations

import functools
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vimfast.errors import UserError
from vimfast.shards.format import (
    MANIFEST,
    PLAN,
    SPLITS,
    STATE_FOLDER,
    crc32_of_file,
    dali_index_name,
    index_name,
    is_shard_name,
    shard_name,
)
from vimfast.shards.origin import MOST_BYTES, Origin, missing_sources
from vimfast.shards.plan import Part
from vimfast.shards.tree import FileList, file_kind, is_image_name, pack_names, unwatched
from vimfast.shards.verify import Differs, verify_sources
from vimfast.shards.writer import Record, read_record, record_path, write_shard
from vimfast.stores import Entry, Missing, Store, open_store

_AHEAD = 32  # requests at a time of one worker: a store answers each only after some 30 ms


@functools.lru_cache(maxsize=4)
def store_at(url: str) -> Store:
    """One for this process."""
    return open_store(url)


# Images


@dataclass(frozen=True)
class StoredFiles(FileList):
    """The images of one split, in a store.

    Attributes:
        url: of the split.
        sizes: int64 [N], bytes.
    """

    url: str = field(kw_only=True)
    sizes: np.ndarray = field(kw_only=True)

    @property
    def where(self) -> str:
        return self.url

    def describe(self, name: str) -> str:
        return f"{self.url}/{name}"

    def origin(self, ids: Sequence[int]) -> Origin:
        return StoreOrigin(self.url, [self.name(i) for i in ids], self.sizes[ids])


class StoreOrigin:
    """Objects of a store, fetched some ahead while they are asked for in order.

    A store says no time of a change that is worth comparing, so a later run goes by their sizes.
    """

    def __init__(self, url: str, names: Sequence[str], sizes: np.ndarray) -> None:
        self._url, self._names, self._sizes = url, names, sizes
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[bytes]] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._url, self._names, self._sizes)

    def name(self, i: int) -> str:
        return f"{self._url}/{self._names[i]}"

    def stat(self) -> np.ndarray:
        sources = missing_sources(len(self._names))
        sources["size"] = self._sizes
        return sources

    def read(self, i: int) -> bytes:
        if self._sizes[i] > MOST_BYTES:
            raise ValueError(f"{self._sizes[i]:,} bytes, which is more than {MOST_BYTES:,}")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="fetch")
        for k in range(i, min(i + _AHEAD, len(self._names))):
            if k not in self._coming and self._sizes[k] <= MOST_BYTES:
                self._coming[k] = self._pool.submit(self._fetch, k)
        data = self._coming.pop(i).result()
        if i + 1 == len(self._names):
            self._pool.shutdown(wait=False)
            self._pool = None
        return data

    def _fetch(self, i: int) -> bytes:
        return store_at(self._url).read(self._names[i])


def list_store(
    url: str,
    split: str,
    classes: Sequence[str] | None,
    watched: Callable[[Iterator[Entry]], Generator[Entry, None, None]] = unwatched,
) -> StoredFiles | None:
    """The images of a split in a store, sorted and labelled as those of a folder; None where there are none.

    Args:
        classes: the training classes, if the split's own folder names are not to define them.
        watched: its entries go through this, which may show how many.

    Raises:
        UserError: the store does not answer, or has a class that is not among them.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    others, loose = Counter[str](), 0
    with closing(watched(store_at(url).entries(split))) as entries:  # also where Ctrl-C ends it
        for entry in entries:
            name, slash, inside = entry.name.removeprefix(f"{split}/").partition("/")
            if any(part.startswith(".") for part in (name, *inside.split("/"))):
                continue
            if slash and is_image_name(os.path.basename(inside)):
                found.setdefault(name, []).append((inside, entry.bytes))
            elif is_image_name(name) and not slash:
                loose += 1
            elif not entry.name.endswith("/"):  # which some tools write to stand for a folder
                others[file_kind(entry.name)] += 1
    if not found:
        return None
    known = sorted(found) if classes is None else list(classes)
    if unknown := sorted(found.keys() - set(known)):
        raise UserError(
            f"{url}/{split}/{unknown[0]} is not a training class ({len(unknown)} of {len(found)} folders are not)",
            f"remove it, or add the class to {url}/train",
        )
    images = [(label, *image) for label, name in enumerate(known) for image in sorted(found.get(name, ()))]
    names, offsets = pack_names([inside for _, inside, _ in images])
    labels = np.array([label for label, _, _ in images], np.int32)
    sizes = np.array([size for _, _, size in images], np.int64)
    where = f"{url.rstrip('/')}/{split}"
    return StoredFiles(Path(split), known, labels, names, offsets, others, loose, url=where, sizes=sizes)


# Shards


class Mirror:
    """The folder of a conversion whose shards are in a store: what of it is needed here.

    Attributes:
        folder: has the manifest, the plan, the records, the indexes, and notes of what archives hold.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self._fetched: dict[str, int] = {}  # checksums of what the store has

    def fetch(self) -> None:
        """What an earlier run has left in the store.

        Raises:
            UserError: the store does not answer.
        """
        (self.folder / STATE_FOLDER).mkdir(exist_ok=True)
        for name in (MANIFEST, f"{STATE_FOLDER}/{PLAN}", *map(index_name, SPLITS)):
            self._get(name)
        for entry in store_at(self.url).entries(STATE_FOLDER):
            if entry.name.endswith(".npz"):
                self._get(entry.name)

    def holds_others(self) -> bool:
        """Whether there are shards in the store, of whatever conversion."""
        return any(is_shard_name(entry.name) for entry in store_at(self.url).entries())

    def collect(self, split: str, number: int) -> None:
        """The record of a shard that was written."""
        self._get(str(record_path(self.folder, split, number).relative_to(self.folder)))

    def publish(self, name: str) -> None:
        """Have a file of the folder in the store."""
        if self._fetched.get(name) != crc32_of_file(self.folder / name):
            store_at(self.url).put(name, self.folder / name)

    def remove(self, name: str) -> None:
        """From both."""
        (self.folder / name).unlink(missing_ok=True)
        self._fetched.pop(name, None)
        store_at(self.url).remove(name)

    def clear(self) -> None:
        """Delete what any conversion has written; the manifest first, so that it does not look complete."""
        self.remove(MANIFEST)
        ours = {index_name(split) for split in SPLITS}
        for entry in list(store_at(self.url).entries()):
            if is_shard_name(entry.name) or entry.name in ours or entry.name.startswith(f"{STATE_FOLDER}/"):
                self.remove(entry.name)

    def _get(self, name: str) -> None:
        try:
            data = store_at(self.url).read(name)
            (self.folder / name).write_bytes(data)
            self._fetched[name] = zlib.crc32(data)
        except Missing:
            (self.folder / name).unlink(missing_ok=True)


@contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """A mirror of a conversion, in a temporary folder; in the block, errors name the store instead of it."""
    with tempfile.TemporaryDirectory(prefix="vimfast-") as name:
        try:
            yield Mirror(url, Path(name))
        except UserError as error:
            here, there = name, url.rstrip("/")
            raise UserError(
                error.problem.replace(here, there), None if error.fix is None else error.fix.replace(here, there)
            ) from None


def write_to_store(part: Part, url: str, skip_bad: bool, tick: Callable[[str], None]) -> Record:
    """:func:`write_shard`, of which the store then has tar, index and record, in this order.

    Raises:
        UserError: as it does, or the store does not answer.
    """
    store, record_name = store_at(url), _record_name(part)
    store.remove(record_name)  # its tar is about to be replaced
    with tempfile.TemporaryDirectory(prefix="vimfast-") as name:
        folder = Path(name)
        (folder / STATE_FOLDER).mkdir()
        record = write_shard(part, folder, skip_bad, tick)
        if (folder / record_name).exists():
            for written in (shard_name(part.split, part.number), dali_index_name(part.split, part.number), record_name):
                store.put(written, folder / written)
    return record


def verify_in_store(part: Part, url: str, tick: Callable[[str], None]) -> Record:
    """The record of a shard that holds: its sources are what they were, and the store has all of it. (Its bytes are
    compared when they are fetched, by whoever trains on them.)

    Raises:
        Differs: it was never finished, is cut off or gone, or a source image is another than was converted.
        UserError: source images cannot be read, which is no fault of theirs, or the store does not answer.
    """
    store, record_name = store_at(url), _record_name(part)
    with tempfile.TemporaryDirectory(prefix="vimfast-") as name:
        path = Path(name, record_name)
        path.parent.mkdir()
        try:
            path.write_bytes(before := store.read(record_name))
        except Missing:
            raise Differs("has no record") from None
        record = read_record(Path(name), part.split, part.number)
        if record is None:
            raise Differs("has a damaged record")
        verify_sources(part, Path(name), record)
        tar, index = (store.find(of(part.split, part.number)) for of in (shard_name, dali_index_name))
        if tar is None or index is None:
            raise Differs("is missing, or its DALI index is")
        if tar.bytes != record.tar_bytes:
            raise Differs(f"has {tar.bytes:,} bytes, not {record.tar_bytes:,} as written")
        if path.read_bytes() != before:  # the times of the sources are others, and their bytes are not
            store.put(record_name, path)
    for image in part.names:
        tick(image)
    return record


def _record_name(part: Part) -> str:
    return str(record_path(Path(), part.split, part.number))
