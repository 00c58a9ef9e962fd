"""How many images per second the loader gives on this machine, with your data, and which flags to train with.

    python tools/bench_loader.py shards/ imagenet_data/ --threads 4 8 16

Each row trains on nothing: images are read, decoded, cropped and augmented as in training, and dropped. "reading" is
the source alone, one batch after the other. "copies" is how often each image is shown side by side (repeated
augmentation on one rank): it is then decoded once. "cores" is the processor time used, a second; "GiB" the GPU memory
that the loader takes.

The fastest loader is not the best one for training, since a GPU that decodes has less time for the model: with
--needed, what your model trains at (tools/bench_train.py), the flags are those that burden the GPU least.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from vimfast.cli import run_main
from vimfast.config import AugmentConfig
from vimfast.data.hardware import DECODERS, choose_decoding
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import training_view
from vimfast.errors import UserError
from vimfast.speed import endless, measure_batches

AUGMENTATIONS = {"crop": None, "recipe": AugmentConfig()}
NEARLY = 0.95  # a row this near to the fastest is as good
ROOM = 1.15  # a loader alone must be this much faster than the model, to feed it without a pause
BURDEN = ("cpu", "cuda", "hardware")  # for a training step beside it: a JPEG engine's images wait one by one


class Row(NamedTuple):
    """One line of the table."""

    source: str
    decoder: str
    threads: int
    augmentation: str
    copies: int
    rate: float  # images per second
    cores: float
    memory: float | None  # GiB


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.empty(1, device=device)  # the context's memory is not the loader's
    print(
        f"{'source':28} {'decoder':9} {'threads':>7} {'augment':8} {'copies':>6} {'img/s':>9} {'cores':>6} {'GiB':>6}"
    )
    rows = []
    for data in args.data:
        source = open_source(data, args.split)
        if not len(source):
            raise UserError(f"{data} has no images in {args.split}; name another split")
        size = min(args.batch_size, len(source))
        show(
            Row(
                data,
                "reading",
                1,
                "",
                1,
                *measure_batches(reading(source, Order(len(source), size)), args.seconds),
                None,
            )
        )
        variants = itertools.product(args.decoders, args.threads, args.augment, args.copies)
        for decoder, threads, augmentation, copies in variants:
            before = used(device)
            order = Order(len(source), size, repeats=copies)
            view = training_view(order, device, AUGMENTATIONS[augmentation], size=args.input_size)
            settings = LoaderSettings(decoder, threads, args.prefetch, engine_share=args.hw_decoder_load)
            loader = Loader(source, view, settings)
            finish = torch.cuda.synchronize if device.type == "cuda" else None
            rate, cores = measure_batches((len(b.labels) for b in endless(loader)), args.seconds, finish)
            memory = None if before is None else (used(device) or 0) - before
            chosen = loader.settings
            rows.append(Row(data, chosen.decoder, chosen.threads, augmentation, copies, rate, cores, memory))
            show(rows[-1])
            loader.close()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(f"\n{recommend(rows, args.prefetch, args.needed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards folders, or folder trees with train/")
    parser.add_argument("--split", default="train", choices=["train", "val"])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, help="to try; default: all that the machine has")
    parser.add_argument("--hw-decoder-load", type=float, help="share for the JPEG engine; default: as in training")
    parser.add_argument("--threads", type=int, nargs="+", help="decoding threads to try; default: as in training")
    parser.add_argument("--augment", nargs="+", choices=AUGMENTATIONS, default=list(AUGMENTATIONS))
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 3], help="of each image, to try")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--prefetch", type=int, default=3, help="batches decoded ahead")
    parser.add_argument("--needed", type=float, help="images per second that your model trains at on images in memory")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each row for")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.decoders is None:
        found = choose_decoding("auto", None, device, demand=None).decoder
        args.decoders = [found] if device.type == "cpu" else list(dict.fromkeys([found, "cuda", "cpu"]))
    args.threads = args.threads or [None]
    return args


def reading(source: Source, order: Order) -> Iterator[int]:
    """Sizes of batches whose bytes were read, page by page, without end."""
    for epoch in itertools.count():
        for step in range(order.steps):
            images = source.read(order.step(epoch, step)[1])
            for encoded in images.encoded:
                np.add.reduce(encoded[::4096])
            yield len(images.labels)


def used(device: torch.device) -> float | None:
    """Memory of the GPU in use, GiB, whoever uses it."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def show(row: Row) -> None:
    name = row.source if len(row.source) <= 28 else f"...{row.source[-25:]}"
    memory = "" if row.memory is None else f"{row.memory:6.2f}"
    print(
        f"{name:28} {row.decoder:9} {row.threads:7} {row.augmentation:8} {row.copies:6} {row.rate:9,.0f} "
        f"{row.cores:6.1f} {memory:>6}",
        flush=True,
    )


def recommend(rows: list[Row], prefetch: int, needed: float | None = None) -> str:
    """Flags to train with, of the rows with the fullest augmentation.

    The fastest row's, or of one nearly as fast that shows each image once and takes fewer threads; where it is known
    what is `needed`, the decoder that burdens the GPU least comes first among the rows that are fast enough.
    """
    fullest = [row for row in rows if row.augmentation == rows[-1].augmentation]
    enough = NEARLY * max(row.rate for row in fullest)
    if needed is not None:
        enough = min(enough, ROOM * needed)
    good = [row for row in fullest if row.rate >= enough]
    best = min(good, key=lambda row: (BURDEN.index(row.decoder) if needed else 0, row.copies, row.threads))
    flags = f"--data-path {best.source} --decoder {best.decoder} --num-workers {best.threads} --prefetch {prefetch}"
    copies = " --repeated-aug --repeated-aug-on one-rank" if best.copies > 1 else ""
    short = "" if needed is None or best.rate >= ROOM * needed else f", which may not keep {needed:,.0f} img/s fed"
    return f"for {best.rate:,.0f} img/s{short}: {flags}{copies}"


if __name__ == "__main__":
    run_main(main)
