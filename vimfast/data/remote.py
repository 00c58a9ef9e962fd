"""The tars of a shards folder in a store: read from the local cache, to which they come ahead of need.

Where few shards are read at a time (a window of them, or one after another), a batch waits for those that it needs,
since the next batches need them too. Where every batch reads from all of them, it does not wait: images whose shard is
not here yet are requested from the store one by one, a batch ahead, while the shards come. The same is done where there
is no cache, or no room in it. Either way the images are those of the order, so only the speed depends on the cache.
"""

from __future__ import annotations

import shutil
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vimfast.data.cache import Cache, CacheSettings, Held
from vimfast.data.fetching import Fetcher, Shards, Timeline
from vimfast.data.remote_rows import bytes_in_cache, key_of
from vimfast.data.tars import Place, Route, allow_open_files, ask_ahead
from vimfast.errors import UserError, counted, in_bytes
from vimfast.files import read_at
from vimfast.shards.format import Manifest, SplitEntry
from vimfast.shards.rows import Rows
from vimfast.stores import Store

_REQUESTS_AT_ONCE = 64  # for images; a store takes some 30 ms to answer each
_PATIENCE = 240.0  # seconds that a batch waits for a shard; less than a run may stand still (--stall-timeout)
_TELL_AFTER, _TELL_EVERY = 10.0, 30.0  # seconds of waiting


def remote_tars(store: Store, manifest: Manifest, split: str, rows: Rows, settings: CacheSettings) -> RemoteTars:
    """The tars of one split of a shards folder in a store, with their cache.

    Raises:
        UserError: the cache cannot be used.
    """
    entry = manifest.splits[split]
    shards = Shards(store, key_of(split, entry), entry.shards, rows)
    if settings.size == 0:
        return RemoteTars(shards, None, 0)
    cache = Cache(settings.path, settings.size)
    _check_disk(cache, sum(map(_bytes, _read_with(manifest, split))))
    return RemoteTars(shards, cache, most_held(manifest, split, settings.size))


def most_held(manifest: Manifest, split: str, size: int | None) -> int:
    """How many shards of a split may be held in a cache of `size` bytes at a time.

    Where not all data fits, room for two shards is left to each of the other splits, which an evaluation reads one
    after another.

    Raises:
        UserError: too few fit.
    """
    entries = manifest.splits.values()
    if size is None or sum(map(_bytes, entries)) <= size:
        return max(len(manifest.splits[split].shards), 1)
    largest = max(shard.bytes for entry in entries for shard in entry.shards)
    others, indexes = 2 * (len(manifest.splits) - 1), sum(map(bytes_in_cache, entries))
    fit = (size - indexes) // largest
    if fit < others + 2:
        and_indexes = f" and the {indexes:,} of the indexes" if indexes else ""
        raise UserError(
            f"--cache-size {size:,} is less than {others + 2} of the shards, of up to {largest:,} bytes{and_indexes}",
            f"give {(others + 2) * largest + indexes:,} or more, or 0 to keep nothing",
        )
    return fit - others if split == "train" else 2


def check_room_for_all(manifests: Sequence[Manifest], split: str, settings: CacheSettings) -> None:
    """Whether a cache can hold the shards of several data sets at a time: mixed, each batch reads from all of them.

    Raises:
        UserError: it cannot.
    """
    if settings.size == 0:
        return
    data = sum(_bytes(entry) for manifest in manifests for entry in _read_with(manifest, split))
    if settings.size is not None and settings.size < data:
        raise UserError(
            f"--cache-size {settings.size:,} cannot hold the {data:,} bytes of shards, which mixed data sets need",
            f"give {data:,} or more, or 0 to keep nothing",
        )
    _check_disk(Cache(settings.path, settings.size), data)


def _read_with(manifest: Manifest, split: str) -> list[SplitEntry]:
    """The splits that a run reads: one that trains also evaluates."""
    return [entry for name, entry in manifest.splits.items() if split in ("train", name)]


def _bytes(entry: SplitEntry) -> int:
    """What a split takes of a cache."""
    return sum(shard.bytes for shard in entry.shards) + bytes_in_cache(entry)


def _check_disk(cache: Cache, data: int) -> None:
    """Whether the disk has room for the cache, with what is there already.

    Raises:
        UserError: it has not.
    """
    room = shutil.disk_usage(cache.folder).free + cache.used()
    needed = data if cache.size is None else min(data, cache.size)
    if needed > room:
        what = "the shards take" if cache.size is None else "--cache-size is"
        fits = in_bytes(int(room * 0.95)).replace(" ", "")
        raise UserError(
            f"{what} {in_bytes(needed)} and the disk of {cache.folder} has room for {in_bytes(room)}",
            f"free some, take another --cache-dir, or give --cache-size {fits} or less",
        )


class RemoteTars:
    """Tars in a store.

    Args:
        cache: of their copies here; None: nothing is kept.
        most: how many of them may be held in it at a time.
    """

    def __init__(self, shards: Shards, cache: Cache | None, most: int) -> None:
        self._shards, self.cache, self.most = shards, cache, most
        self._timeline: Timeline | None = None
        self._fetcher: Fetcher | None = None  # from the first step on
        self._requests: ThreadPoolExecutor | None = None
        self._asked: list[dict[Place, Future[bytes]]] = [{}, {}]  # images that the last two batches were told of
        self._impatient = False
        self._warned = False

    # What the loader calls

    @property
    def widest_window(self) -> int | None:
        return None if self.cache is None or self.most >= len(self._shards.entries) else max(self.most // 2, 1)

    def follow(self, route: Route, epoch: int, step: int) -> None:
        if self.cache is None:
            return
        if self._fetcher is None:
            allow_open_files(self.most)
            self._fetcher = Fetcher(self._shards, self.cache)
            weakref.finalize(self, self._fetcher.close)
        if self._timeline is None or self._timeline.route is not route:
            self._timeline = Timeline(route, self._shards.firsts)
        if self._impatient and not self._fetcher.missing()[0]:
            self._impatient = False
        self._fetcher.want(self._timeline.from_here(epoch, step, self.most))

    def will_need(self, places: Sequence[Place]) -> None:
        held = {shard: self._held(shard) for shard in {place.shard for place in places}}
        waits, fresh = self._waits, dict[Place, Future[bytes]]()
        for place in places:
            if (copy := held[place.shard]) is not None:
                ask_ahead(copy.file, place.offset, place.size)
            elif not waits:
                fresh[place] = self._request(place)
        self._asked = [self._asked[1], fresh]

    def read(self, places: Sequence[Place]) -> list[bytes]:
        files = {shard: self._file(shard) for shard in dict.fromkeys(place.shard for place in places)}
        asked = {place: self._take(place) for place in dict.fromkeys(places) if files[place.shard] is None}
        return [
            self._read_held(held, place) if (held := files[place.shard]) else asked[place].result() for place in places
        ]

    def read_again(self, place: Place) -> bytes:
        if self._fetcher is not None and self._held(place.shard):
            self._warn(f"a copy of {self.name(place.shard)} in {self._folder} is damaged: it is fetched again")
            self._fetcher.forget(place.shard)
        return self._read_range(place)

    def name(self, shard: int) -> str:
        return self._shards.url(shard)

    # Copies here

    @property
    def _folder(self) -> Path:
        assert self.cache is not None
        return self.cache.folder

    @property
    def _waits(self) -> bool:
        """Whether shards that are not here are waited for."""
        return self._timeline is not None and self._timeline.route.by_shard and not self._impatient

    def _held(self, shard: int) -> Held | None:
        return None if self._fetcher is None else self._fetcher.held(shard)

    def _file(self, shard: int) -> Held | None:
        """The copy of a shard, once it is here; None where its images have to be requested."""
        held = self._held(shard)
        if held is not None or self.cache is None or self._fetcher is None or not self._waits:
            return held
        begin = time.monotonic()
        told = begin + _TELL_AFTER - _TELL_EVERY
        while (held := self._fetcher.wait(shard, 1.0)) is None and self._fetcher.wants(shard):
            now = time.monotonic()
            if (why := self._fetcher.without_room_for(shard)) is not None:
                self._warn(
                    f"the cache in {self._folder} has no room for {self.name(shard)} ({why}): its images are read from "
                    "the store one by one"
                )
                return None
            if now > begin + _PATIENCE:
                self._impatient = True
                return None
            if now > told + _TELL_EVERY:
                told = now
                missing, wanted = self._fetcher.missing()
                _say(f"waiting for data: {wanted - missing} of the next {counted(wanted, 'shard')} have arrived")
        # One that is not to come, as it was read before, may still be in the cache.
        return held or self.cache.hold(self._shards.cached_name(shard))

    def _read_held(self, held: Held, place: Place) -> bytes:
        try:
            data = read_at(held.file, place.offset, place.size)
        except OSError as error:
            self._warn(f"{self._folder} cannot be read ({error.strerror}): images are read from the store instead")
            data = b""
        return data if len(data) == place.size else self._read_range(place)

    # Images of the store

    def _take(self, place: Place) -> Future[bytes]:
        for asked in self._asked:
            if (found := asked.pop(place, None)) is not None:
                return found
        return self._request(place)

    def _request(self, place: Place) -> Future[bytes]:
        if self._requests is None:
            self._requests = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="request")
        return self._requests.submit(self._read_range, place)

    def _read_range(self, place: Place) -> bytes:
        shards = self._shards
        return shards.store.read_range(shards.entries[place.shard].name, place.offset, place.size)

    def _warn(self, sentence: str) -> None:
        """Once; more of the same would follow."""
        if not self._warned:
            self._warned = True
            _say(f"warning: {sentence}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
