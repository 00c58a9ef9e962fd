"""Shards on their way from a store into the cache, ahead of need, in the order in which they are going to be read."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vimfast.data.cache import Cache, Download, Held, NoRoom
from vimfast.data.tars import Route
from vimfast.errors import UserError, counted
from vimfast.files import read_at
from vimfast.shards.format import ShardEntry
from vimfast.shards.rows import Rows
from vimfast.stores import Store, name_in

_SHARDS_AT_ONCE = 3  # of a process: while the last bytes of one come, and are checked, those of the next do
_PARTS_AT_ONCE = 4  # of a shard
_PART_BYTES = 8 << 20
_PLACES = 1 << 18  # of an epoch, looked at together
_POLL, _ROOM_POLL = 0.05, 1.0  # seconds between two looks at what other processes fetch, and at what they let go of


class Timeline:
    """When the shards of a route are needed, in places of an epoch.

    An epoch is looked at in blocks: that of 14 million images would take some 300 MB as a whole.

    Args:
        firsts: the first image of each shard, and the number of all images; int64 [shards + 1].
    """

    def __init__(self, route: Route, firsts: np.ndarray) -> None:
        self.route = route
        self._firsts = firsts
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def from_here(self, epoch: int, step: int, most: int) -> list[int]:
        """The shards that are read from a step on, by when they are needed first, at most so many; those of the next
        epoch come last."""
        here = self.route.drawn_before(step)
        order, last = self._epoch(epoch)
        coming: list[int] = order[last[order] >= here].tolist()
        if self.route.endless and len(coming) < most:
            following, _ = self._epoch(epoch + 1)
            known = set(coming)
            coming += [shard for shard in following.tolist() if shard not in known]
        for past in self._epochs.keys() - {epoch, epoch + 1}:
            del self._epochs[past]
        return coming[:most]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards that are read at all, by their first images; and of each shard, where its last image comes."""
        if epoch not in self._epochs:
            end, count = self.route.length, len(self._firsts) - 1
            first, last = np.full(count, end), np.full(count, -1)
            blocks = deque(range(0, end, _PLACES))
            while blocks and (first == end).any():
                shards, places = self._block(epoch, blocks.popleft())
                last[shards] = places  # of equal ones, the last counts
                fresh = first[shards] == end
                first[shards[fresh][::-1]] = places[fresh][::-1]
            ended = np.zeros(count, bool)
            while blocks and not ended.all():  # from the end on; all shards have begun before
                shards, places = self._block(epoch, blocks.pop())
                fresh = ~ended[shards]
                last[shards[fresh]] = places[fresh]
                ended[shards] = True
            order = np.argsort(first, kind="stable")
            self._epochs[epoch] = order[first[order] < end], last
        return self._epochs[epoch]

    def _block(self, epoch: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of the images at some places, and those places."""
        places, ids = self.route.drawn(epoch, begin, begin + _PLACES)
        return np.searchsorted(self._firsts, ids, "right") - 1, places


@dataclass(frozen=True)
class Shards:
    """The shards of a split in a store.

    Args:
        key: their folder in the cache.
        rows: of the index, of all images.
    """

    store: Store
    key: str
    entries: Sequence[ShardEntry]
    rows: Rows

    @cached_property
    def firsts(self) -> np.ndarray:
        """The first image of each shard, and the number of all images; int64 [shards + 1]."""
        return np.cumsum([0, *(entry.samples for entry in self.entries)])

    def cached_name(self, shard: int) -> str:
        """In the cache."""
        return f"{self.key}/{self.entries[shard].name}"

    def url(self, shard: int) -> str:
        """As sentences have it."""
        return name_in(self.store, self.entries[shard].name)

    def damaged(self, shard: int, file: int) -> int:
        """How many images of a copy of this shard, an open file, are not what was stored."""
        rows = self.rows[np.arange(*self.firsts[shard : shard + 2])]
        places = zip(rows["offset"].tolist(), rows["size"].tolist(), rows["crc32"].tolist(), strict=True)
        return sum(zlib.crc32(read_at(file, offset, size)) != stored for offset, size, stored in places)


class Fetcher:
    """Keeps the shards that are read next in the cache, and held. Other processes do the same with the same cache:
    each fetches what is not there and no other is fetching.

    """

    def __init__(self, shards: Shards, cache: Cache) -> None:
        self._shards, self._cache = shards, cache
        self._changed = threading.Condition()
        self._wanted: list[int] = []  # by when they are needed
        self._held: dict[int, Held] = {}
        self._busy: set[int] = set()  # being fetched by a thread of this process
        self._failed: dict[int, Exception] = {}
        self._stuck: tuple[int, NoRoom | OSError] | None = None  # the first shard that there is no room for, and why
        self._closed = False
        for _ in range(_SHARDS_AT_ONCE):
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        """These are read next, in this order of first need, and held at a time; others are let go of."""
        wanted = list(shards)
        with self._changed:
            if wanted == self._wanted:
                return
            self._wanted, self._stuck = wanted, None
            kept = set(wanted)
            for shard in self._held.keys() - kept:
                del self._held[shard]
            missing = [shard for shard in wanted if not self._hold(shard)]  # what is here already is here at once
            if missing:  # else threads would wake each step for nothing
                self._changed.notify_all()

    def wants(self, shard: int) -> bool:
        """Whether it is to come."""
        with self._changed:
            return shard in self._wanted

    def held(self, shard: int) -> Held | None:
        """Its file, if it is here."""
        with self._changed:
            return self._held.get(shard)

    def wait(self, shard: int, seconds: float) -> Held | None:
        """Its file, once it is here; None where it does not come: it is not wanted, there is no room, or it takes
        longer.

        Raises:
            UserError: it cannot be fetched; the sentence names it. Asked again, it is tried again.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while shard not in self._held:
                if shard in self._failed:
                    raise self._failed.pop(shard)
                if shard not in self._wanted or self.without_room_for(shard) or time.monotonic() > end or self._closed:
                    return None
                self._changed.wait(_ROOM_POLL)
            return self._held[shard]

    def without_room_for(self, shard: int) -> NoRoom | OSError | None:
        """What keeps this shard from coming, if that is the cache."""
        with self._changed:
            if self._stuck is None or shard in self._held or shard in self._busy or shard not in self._wanted:
                return None
            first, why = self._stuck
            return why if self._wanted.index(shard) >= self._wanted.index(first) else None

    def missing(self) -> tuple[int, int]:
        """How many of those wanted are not here, and how many are wanted."""
        with self._changed:
            return len(self._wanted) - len(self._held), len(self._wanted)

    def forget(self, shard: int) -> None:
        """A copy that is not what was stored: it is fetched again when it is wanted again."""
        with self._changed:
            if self._held.pop(shard, None) is not None:
                self._cache.discard(self._shards.cached_name(shard))
            self._wanted = []  # so that the next call of want begins on it

    def close(self) -> None:
        """End the threads, soon."""
        with self._changed:
            self._closed = True
            self._held.clear()
            self._changed.notify_all()

    def _hold(self, shard: int) -> bool:
        """Whether it is here, and held from now on."""
        if shard not in self._held and (held := self._cache.hold(self._shards.cached_name(shard))) is not None:
            self._held[shard] = held
        return shard in self._held

    # Threads

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                found = self._next()
                if isinstance(found, float):
                    self._changed.wait(found)
                    continue
                shard, download = found
                self._busy.add(shard)
            held: Held | Exception
            try:
                held = self._fetch(shard, download)
            except OSError as error:  # although the room had been taken
                where = f"{self._shards.url(shard)} cannot be kept in {self._cache.folder} ({error.strerror})"
                held = UserError(where, "free some of that disk, or take another --cache-dir")
            except Exception as error:  # raised where the shard is waited for
                held = error
            with self._changed:
                self._busy.discard(shard)
                if isinstance(held, Exception):
                    self._failed[shard] = held
                elif shard in self._wanted and not self._closed:
                    self._held[shard] = held
                self._changed.notify_all()

    def _next(self) -> tuple[int, Download] | float:
        """The first shard that somebody has to fetch, begun; or how long to wait before looking again, in seconds."""
        pause = 3600.0
        for shard in self._wanted:
            if shard in self._held or shard in self._busy or shard in self._failed:
                continue
            if self._hold(shard):
                self._changed.notify_all()
                continue
            try:
                download = self._begin(shard)
            except (NoRoom, OSError) as error:
                if self._stuck is None or self._stuck[0] != shard:  # each time would have the threads wake each other
                    self._changed.notify_all()
                self._stuck = shard, error
                return _ROOM_POLL
            self._stuck = None
            if download is not None:
                return shard, download
            pause = _POLL  # another process is at it
        return pause

    def _begin(self, shard: int) -> Download | None:
        """What is needed later than this shard makes room for it, what is needed last first."""
        while True:
            try:
                return self._cache.begin(self._shards.cached_name(shard), self._shards.entries[shard].bytes)
            except NoRoom:  # noqa: PERF203
                later = self._wanted[self._wanted.index(shard) + 1 :]
                last = next((one for one in reversed(later) if one in self._held), None)
                if last is None:
                    raise
                del self._held[last]

    def _fetch(self, shard: int, download: Download) -> Held:
        try:
            self._copy(shard, download.file)
            wrong = self._shards.damaged(shard, download.file)
            if wrong:  # on its way, perhaps
                self._copy(shard, download.file)
                wrong = self._shards.damaged(shard, download.file)
            if wrong:
                raise UserError(
                    f"{self._shards.url(shard)} is damaged: {counted(wrong, 'image')} in it differ from the index",
                    "copy it to the store again, then resume",
                )
            return download.finish()
        except BaseException:
            download.abandon()
            raise

    def _copy(self, shard: int, file: int) -> None:
        entry = self._shards.entries[shard]
        copy(self._shards.store, entry.name, entry.bytes, file, lambda: self._closed)


def copy(store: Store, name: str, size: int, file: int, ended: Callable[[], bool] = lambda: False) -> None:
    """Write an object of `size` bytes to an open file, in parts, several at a time. None is being written any more when
    this returns.

    Args:
        ended: asked before each part whether to leave it at that.

    Raises:
        UserError: it cannot be read, or is too short.
        OSError: it cannot be written.
    """
    left = iter(range(0, size, _PART_BYTES))  # next() on it is atomic
    errors: list[Exception] = []

    def copy_some() -> None:
        try:
            for offset in left:
                if errors or ended():
                    return
                _write(file, offset, store.read_range(name, offset, min(_PART_BYTES, size - offset)))
        except Exception as error:
            errors.append(error)

    # Not a pool's: those are waited for when the interpreter ends, even if their store does not answer.
    threads = [threading.Thread(target=copy_some, name="fetch-part", daemon=True) for _ in range(_PARTS_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _write(file: int, offset: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
