"""What reading shards from an object store costs, against a server on loopback.

    python tools/bench_remote.py shards/                # all of it
    python tools/bench_remote.py shards/ --only clients # obstore, and fsspec's s3fs where that is installed

- clients: whole objects, parts of 8 MB and images, in MB/s and processor time;
- warm: the loader with every shard in its cache, against the same shards on the disk; both read, then both decode;
- cold: an epoch of windows with an empty cache, from a store limited in rate and latency, against that rate; then the
  same with a cache that holds two windows;
- none: a permutation without a cache, image by image, from a store of that latency.

Use shards of images as yours are, of some GB, and enough of them for the window (--shard-samples of vimfast prepare).
Two of the cores are enough to see the client's cost, and the server needs some of them: compare on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from object_server import environment

from vimfast.cli import run_main
from vimfast.data.cache import CacheSettings
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import training_view
from vimfast.shards.format import read_manifest
from vimfast.stores import open_store

PARTS = ("clients", "warm", "cold", "none")
_PART_BYTES, _IMAGE_BYTES, _IMAGES = 8 << 20, 110_000, 2000


def main() -> None:
    args = parse()
    for part in args.only:
        print(f"\n{part}")
        {"clients": clients, "warm": warm, "cold": cold, "none": none}[part](args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a shards folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rate", type=float, default=200.0, help="of the limited store, MB/s")
    parser.add_argument("--latency", type=float, default=30.0, help="of the limited store, ms")
    parser.add_argument("--window", type=int, default=2, help="shards")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, help="of an epoch from the warm cache; all without it")
    parser.add_argument("--rounds", type=int, default=9, help="of the warm cache: epochs from each")
    parser.add_argument("--scratch", type=Path, help="for caches; default: a temporary folder")
    return parser.parse_args()


@contextmanager
def served(data: Path, rate: float | None = None, latency: float = 0.0) -> Iterator[str]:
    """The folder as a bucket, in a process of its own; its URL."""
    command = [sys.executable, str(Path(__file__).parent / "object_server.py"), str(data), "--latency", str(latency)]
    command += ["--rate", str(rate)] if rate else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline().split("127.0.0.1:")[1].split()[0])
    os.environ |= environment(port)
    try:
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    """An empty folder."""
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# Clients


def clients(args: argparse.Namespace) -> None:
    """MB/s and processor time of this process, by client, latency and size of request."""
    names = ["obstore", *(["s3fs"] if find_spec("s3fs") else [])]
    shard = max(read_manifest(args.data).splits["train"].shards, key=lambda entry: entry.bytes)
    for latency in (0.0, args.latency):
        with served(args.data, latency=latency) as url:
            for kind in ("objects", "parts", "images"):
                for name in names:
                    read = _obstore if name == "obstore" else _s3fs
                    report(f"{name:8} {kind:8} {latency:3.0f} ms", *read(url, shard.name, shard.bytes, kind))


def _ranges(size: int, kind: str) -> list[tuple[int, int]]:
    """Offset and size of requests for at least 1 GB of objects or parts, or of images."""
    if kind == "images":
        draw = random.Random(0)
        return [(draw.randrange(size - _IMAGE_BYTES), _IMAGE_BYTES) for _ in range(_IMAGES)]
    own = size if kind == "objects" else _PART_BYTES
    once = [(offset, min(own, size - offset)) for offset in range(0, size, own)]
    return once * -(-(1 << 30) // size)


def _at_once(kind: str) -> int:
    return {"objects": 1, "parts": 8, "images": 32}[kind]


def _obstore(url: str, name: str, size: int, kind: str) -> tuple[int, int, float, float]:
    store, ranges = open_store(url), _ranges(size, kind)
    store.find(name)

    def one(span: tuple[int, int]) -> int:
        return len(store.read(name) if kind == "objects" else store.read_range(name, *span))

    with ThreadPoolExecutor(_at_once(kind)) as pool:
        return len(ranges), *timed(lambda: sum(pool.map(one, ranges)))


def _s3fs(url: str, name: str, size: int, kind: str) -> tuple[int, int, float, float]:
    import s3fs

    path, ranges, together = f"{url}/{name}".removeprefix("s3://"), _ranges(size, kind), _at_once(kind)
    system = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        config_kwargs={"s3": {"addressing_style": "path"}, "max_pool_connections": 64},
    )
    system.info(path)

    def all_of_them() -> int:
        count = 0
        for first in range(0, len(ranges), 4 * together):
            some = ranges[first : first + 4 * together]
            begins, ends = [offset for offset, _ in some], [offset + length for offset, length in some]
            count += sum(map(len, system.cat_ranges([path] * len(some), begins, ends, batch_size=together)))
        return count

    return len(ranges), *timed(all_of_them)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Bytes that the work returns, seconds, and seconds of processor time of this process."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    count = work()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return count, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(what: str, requests: int, count: int, seconds: float, processor: float) -> None:
    print(
        f"{what}: {count / seconds / 1e6:6,.0f} MB/s, {requests / seconds:6,.0f} requests/s, "
        f"{processor / count * 1e9:5.2f} s of a core for a GB",
        flush=True,
    )


# The loader


def order_of(source: Source, args: argparse.Namespace) -> Order:
    return Order(len(source), args.batch_size, bounds=source.bounds(), window=args.window)


def read_epoch(source: Source, order: Order, epoch: int = 0) -> int:
    """All bytes of an epoch, by the calls of a loader; how many."""
    count = 0
    for step in range(order.steps):
        source.follow(order, epoch, step)
        if step + 1 < order.steps:
            source.will_need(order.step(epoch, step + 1)[1])
        count += sum(len(image) for image in source.read(order.step(epoch, step)[1]).encoded)
    return count


def decode_epoch(source: Source, order: Order) -> int:
    """All images of an epoch, by a loader on the CPU; how many."""
    loader = Loader(source, training_view(order, torch.device("cpu")), LoaderSettings())
    count = sum(len(batch.labels) for batch in loader.epoch(0))
    loader.close()
    return count


def forget(folder: Path) -> None:
    """Have the system drop all tars below a folder from memory."""
    for path in folder.rglob("*.tar"):
        file = os.open(path, os.O_RDWR)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_images(source: Source, order: Order) -> tuple[int, float, float]:
    """Of an epoch: how many, seconds, and seconds of processor time."""
    _, seconds, processor = timed(partial(read_epoch, source, order))
    return order.steps * order.global_batch, seconds, processor


def decode_images(source: Source, order: Order) -> tuple[int, float, float]:
    """The same with decoding, once a loader has begun."""
    loader = Loader(source, training_view(order, torch.device("cpu")), LoaderSettings())
    batches = loader.epoch(0)
    next(batches)
    measured = timed(lambda: sum(len(batch.labels) for batch in batches))
    loader.close()
    return measured


class Rounds(NamedTuple):
    """What epochs took, one for each round."""

    rates: list[float]  # a second
    processor: list[float]  # microseconds of processor time for an image, of all threads of this process


def warm(args: argparse.Namespace) -> None:
    """Epochs in turn from the disk and from a full cache, which of them is first in turn, too.

    Processor time is what to compare where something else runs.
    """
    with served(args.data) as url, scratch(args) as folder:
        here, away = open_source(args.data, "train"), open_source(url, "train", CacheSettings(str(folder)))
        for _ in range(2):  # copies, and checksums
            read_epoch(here, order_of(here, args))
            read_epoch(away, order_of(away, args))
        for tars in (args.data, folder):  # of a file just written, the system keeps larger pieces than of one it read
            forget(tars)
        read_epoch(here, order_of(here, args))
        read_epoch(away, order_of(away, args))
        for what, work in (("reading", read_images), ("loading", decode_images)):
            disk, cache = Rounds([], []), Rounds([], [])
            for number in range(args.rounds):
                for source, found in ((here, disk), (away, cache))[:: -1 if number % 2 else 1]:
                    images, seconds, processor = work(source, replace(order_of(source, args), limit=args.steps))
                    found.rates.append(images / seconds)
                    found.processor.append(1e6 * processor / images)
            compare(f"{what}, images/s", cache.rates, disk.rates)
            compare(f"{what}, µs of processor time an image", cache.processor, disk.processor)


def compare(what: str, cache: list[float], disk: list[float]) -> None:
    """Medians, and the quartiles of the quotients of each round."""
    shares = [ours / theirs for ours, theirs in zip(cache, disk, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    print(
        f"{what}: {statistics.median(disk):,.0f} from the disk, {statistics.median(cache):,.0f} from the cache; "
        f"{middle:.1%} in a round (half of the rounds: {low:.1%} to {high:.1%})",
        flush=True,
    )


def plain(url: str, args: argparse.Namespace) -> int:
    """All bytes of all shards, by twelve requests at a time, and nothing done with them; how many."""
    store = open_store(url)
    parts = [
        (shard.name, offset, min(_PART_BYTES, shard.bytes - offset))
        for shard in read_manifest(args.data).splits["train"].shards
        for offset in range(0, shard.bytes, _PART_BYTES)
    ]
    with ThreadPoolExecutor(12) as pool:
        return sum(pool.map(lambda part: len(store.read_range(*part)), parts))


def cold(args: argparse.Namespace) -> None:
    """One epoch, in MB/s: against the limit, and against the same bytes when nothing is done with them."""
    shards = read_manifest(args.data).splits["train"].shards
    data = sum(shard.bytes for shard in shards)
    two = (2 * args.window + 2) * max(shard.bytes for shard in shards)
    for what, size in (("a cache for all", None), (f"a cache of {two / 1e6:,.0f} MB", two)):
        for work in (read_epoch, decode_epoch):
            with served(args.data, args.rate, args.latency) as url, scratch(args) as folder:
                source = open_source(url, "train", CacheSettings(str(folder), size))
                _, reference, _ = timed(partial(plain, url, args))
                _, seconds, processor = timed(partial(work, source, order_of(source, args)))
                rate, share = data / seconds / 1e6, reference / seconds
                how = "reading" if work is read_epoch else "loading"
                print(
                    f"{how}, {what}: {data / 1e6:,.0f} MB in {seconds:.1f} s, {rate:,.0f} MB/s of {args.rate:.0f}: "
                    f"{rate / args.rate:.1%}; {share:.1%} of plain requests; {processor / seconds:.2f} cores",
                    flush=True,
                )


def none(args: argparse.Namespace) -> None:
    """Some steps of an epoch, in images a second."""
    with served(args.data, latency=args.latency) as url:
        source = open_source(url, "train", CacheSettings(size=0))
        order = Order(len(source), args.batch_size, limit=40)
        _, seconds, processor = timed(partial(read_epoch, source, order))
        images = order.steps * order.global_batch
        print(f"reading: {images / seconds:,.0f} images/s; {processor / seconds:.2f} cores", flush=True)


if __name__ == "__main__":
    run_main(main)
