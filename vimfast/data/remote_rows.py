"""The index of a split in a store: read into memory, or, a large one, kept as a file in the cache."""

from __future__ import annotations

import os
import time
import zlib

from vimfast.data.cache import Cache, CacheSettings, Held, NoRoom
from vimfast.data.fetching import copy
from vimfast.errors import UserError
from vimfast.files import READ_BYTES, read_at
from vimfast.shards.format import Manifest, SplitEntry, fetch_index, index_name
from vimfast.shards.rows import Rows, index_bytes, rows_in_file, rows_in_memory, stays_in_file
from vimfast.stores import Store, name_in

_POLL = 0.05  # seconds between two looks at what another process fetches


def key_of(split: str, entry: SplitEntry) -> str:
    """The folder of a split in a cache. The index has the checksum of every image, so its own is as good as a name for
    all of them, wherever they are."""
    return f"{split}-{entry.samples}-{entry.index_crc32:08x}"


def bytes_in_cache(entry: SplitEntry) -> int:
    """What the index of a split takes of a cache."""
    return index_bytes(entry) if stays_in_file(entry) else 0


def remote_rows(store: Store, manifest: Manifest, split: str, settings: CacheSettings) -> Rows:
    """The index of a split of a shards folder in a store.

    Raises:
        UserError: it is damaged, or there is no room for it in the cache.
    """
    entry, classes = manifest.splits[split], len(manifest.classes)
    if not stays_in_file(entry) or settings.size == 0:
        index = fetch_index(store, split, entry.samples, entry.index_crc32)
        return rows_in_memory(index, entry, classes, name_in(store, index_name(split)))
    cache, name = Cache(settings.path, settings.size), f"{key_of(split, entry)}/{index_name(split)}"
    held = _held(store, index_name(split), entry, cache, name)
    # The lock, which keeps it from being evicted, is held until the last copy of its descriptor is closed.
    fix = "delete it and run again, which fetches it again"
    return rows_in_file(os.dup(held.file), entry, classes, str(cache.folder / name), fix)


def _held(store: Store, there: str, entry: SplitEntry, cache: Cache, name: str) -> Held:
    """The file in the cache, fetched by this process or another one if it is not there."""
    while (held := cache.hold(name)) is None:
        try:
            download = cache.begin(name, index_bytes(entry))
        except (NoRoom, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"the cache in {cache.folder} has no room for the {index_bytes(entry):,} bytes of "
                f"{name_in(store, there)} ({why})",
                "give a larger --cache-size, another --cache-dir, or --cache-size 0 to keep it in memory",
            ) from None
        if download is None:
            time.sleep(_POLL)
            continue
        try:
            for _ in range(2):  # it may have been damaged on its way
                copy(store, there, index_bytes(entry), download.file)
                if _checksum(download.file, index_bytes(entry)) == entry.index_crc32:
                    return download.finish()
            raise UserError(
                f"{name_in(store, there)} is damaged: its checksum is not the manifest's {entry.index_crc32}",
                "copy it to the store again",
            )
        except BaseException:
            download.abandon()
            raise
    return held


def _checksum(file: int, size: int) -> int:
    checksum = 0
    for offset in range(0, size, READ_BYTES):
        checksum = zlib.crc32(read_at(file, offset, READ_BYTES), checksum)
    return checksum
