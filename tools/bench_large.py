"""How a set as large as ImageNet-21k opens: time, memory of a rank, and the order of an epoch.

    python tools/bench_large.py /data/large --images 14200000
    python tools/bench_large.py /data/large --cache /data/cache     # from a store on loopback

The folder gets an index of random rows and tars without content; images are not read.
"""

from __future__ import annotations

import argparse
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vimfast.data.cache import CacheSettings
from vimfast.data.fetching import Timeline
from vimfast.data.order import Order
from vimfast.data.source import ShardSource, open_source
from vimfast.shards.format import (
    FORMAT,
    INDEX_DTYPE,
    VERSION,
    Manifest,
    ShardEntry,
    SplitEntry,
    index_header,
    index_name,
    shard_name,
    write_manifest,
)

CLASSES, SHARD, BYTES = 21_841, 4096, 512 << 20  # of a tar


def make(folder: Path, images: int) -> None:
    """A folder of shards in which only the images are missing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards = -(-images // SHARD)
    rows = np.zeros(images, INDEX_DTYPE)
    rows["shard"] = np.arange(images) // SHARD
    rows["offset"] = np.arange(images) % SHARD * (BYTES // SHARD) + 512
    rows["size"], rows["height"], rows["width"] = 100_000, 375, 500
    rows["label"] = rng.integers(0, CLASSES, images)
    rows["crc32"] = rng.integers(0, 1 << 32, images)
    data = index_header(images) + rows.tobytes()
    (folder / index_name("train")).write_bytes(data)
    entries = []
    for number in range(shards):
        with open(folder / shard_name("train", number), "wb") as file:
            os.truncate(file.fileno(), BYTES)
        entries.append(ShardEntry(shard_name("train", number), min(SHARD, images - number * SHARD), BYTES))
    split = SplitEntry(images, images * 100_000, entries, zlib.crc32(data), [], [])
    classes = [f"n{i:08d}" for i in range(CLASSES)]
    write_manifest(folder, Manifest(FORMAT, VERSION, "", "", classes, 0, None, None, {"train": split}))


def own_memory() -> int:
    """Bytes of this process that it shares with none and with no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


@contextmanager
def opened_from(args: argparse.Namespace) -> Iterator[tuple[Path | str, CacheSettings | None]]:
    """The folder, or its URL on a server and a cache that holds some of its shards."""
    if args.cache is None:
        yield args.folder, None
        return
    from bench_remote import served

    with served(args.folder) as url:
        yield url, CacheSettings(str(args.cache), 8 * BYTES)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there; 0.5 GB")
    parser.add_argument("--images", type=int, default=14_200_000)
    parser.add_argument("--cache", type=Path, help="read the folder through a server and a cache in this one; 0.5 GB")
    args = parser.parse_args()
    if not args.folder.exists():
        make(args.folder, args.images)
    with opened_from(args) as (place, cache):
        measure(place, cache)


def measure(place: Path | str, cache: CacheSettings | None) -> None:
    """Open it, look at the order of two epochs, and print."""
    before, begin, processor = own_memory(), time.perf_counter(), time.thread_time()
    source = open_source(place, "train", cache)
    assert isinstance(source, ShardSource)
    opened, processor = time.perf_counter(), time.thread_time() - processor
    source.class_counts()
    checked = time.perf_counter()
    order = Order(len(source), 128, repeats=3)
    order.step(0, 0)
    first = time.perf_counter()
    positions, ids = order.step(1, 0)
    next_epoch = time.perf_counter()
    for step in range(200):
        source._rows[order.step(1, step)[1]]
    batches = time.perf_counter()
    print(
        f"{len(source):,} images: open in {opened - begin:.3f} s, {processor:.3f} of them of the processor; "
        f"index checked {checked - opened:.2f} s later"
    )
    print(f"first batch of the next epoch: {1e3 * (next_epoch - first):.2f} ms ({len(positions)}, {ids[0]})")
    print(f"order and rows of a batch of 128: {1e3 * (batches - next_epoch) / 200:.2f} ms")
    if cache is not None:
        for kind, route in (("all", order), ("a window", Order(len(source), 128, bounds=source.bounds()))):
            begin = time.perf_counter()
            Timeline(route, np.array(source.bounds())).from_here(0, 0, 8)
            print(f"next shards of an order of {kind}: {time.perf_counter() - begin:.2f} s")
    print(f"memory of its own: {(own_memory() - before) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
