"""How many pictures a second the loader gives on this machine, with your data.

    python tools/bench_loader.py shards/ imagenet_data/ --threads 4 8 16

Each row trains on nothing: pictures are read, decoded, cropped and normalized as in training, and dropped. "reading"
is the source alone, one batch after the other in one thread. "cores" is the processor time used, a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from vimfast.cli import run_main
from vimfast.data.loader import Loader, default_threads
from vimfast.data.sampler import Order
from vimfast.data.source import Source, open_source
from vimfast.errors import UserError

WARM_UP_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards folders, or folder trees with train/")
    parser.add_argument("--split", default="train", choices=["train", "val"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[default_threads()], help="decoding threads to try")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--prefetch", type=int, default=2, help="batches decoded ahead")
    parser.add_argument("--interpolation", default="bicubic")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each row for")
    args = parser.parse_args()
    print(f"{'source':32} {'device':8} {'threads':>7} {'img/s':>9} {'cores':>6}")
    for data in args.data:
        source = open_source(data, args.split)
        if not len(source):
            raise UserError(f"{data} has no pictures in {args.split}; name another split")
        order = Order(len(source), min(args.batch_size, len(source)))
        row(data, "reading", 1, *measure(reading(source, order), args.seconds))
        for threads in args.threads:
            loader = Loader(
                source,
                order,
                device=args.device,
                training=True,
                size=args.input_size,
                interpolation=args.interpolation,
                threads=threads,
                prefetch=args.prefetch,
            )
            finish = torch.cuda.synchronize if loader.device.type == "cuda" else None
            row(data, args.device, threads, *measure(decoding(loader), args.seconds, finish))
            loader.close()


def reading(source: Source, order: Order) -> Iterator[int]:
    """Sizes of batches whose bytes were read, page by page, without end."""
    epoch = 0
    while True:
        for step in range(order.steps):
            pictures = source.read(order.step(epoch, step)[1])
            for encoded in pictures.encoded:
                np.add.reduce(encoded[::4096])
            yield len(pictures.labels)
        epoch += 1


def decoding(loader: Loader) -> Iterator[int]:
    """Sizes of the loader's batches, without end."""
    epoch = 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.labels)
        epoch += 1


def measure(batches: Iterator[int], seconds: float, finish: Callable[[], None] | None = None) -> tuple[float, float]:
    """Pictures a second and processor cores in use, after a warm-up; `finish` waits for what is still on its way."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    if finish:
        finish()
    begin, processor, pictures = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        pictures += next(batches)
    if finish:
        finish()
    wall = time.perf_counter() - begin
    return pictures / wall, (time.process_time() - processor) / wall


def row(source: str, device: str, threads: int, rate: float, cores: float) -> None:
    name = source if len(source) <= 32 else f"...{source[-29:]}"
    print(f"{name:32} {device:8} {threads:7} {rate:9,.0f} {cores:6.1f}", flush=True)


if __name__ == "__main__":
    run_main(main)
