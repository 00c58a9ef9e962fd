"""Is the loader on a CPU faster than timm's pipeline on Pillow? The same images and recipe, in turn.

    python tools/bench_timm.py imagenet_data/ --rounds 5 --seconds 20

Both give batches for training: random resized crop, flip, RandAugment, random erasing, normalized. timm decodes in as
many processes as there are cores, vimfast in as many threads. Each round runs one after the other, each in a process of
its own, so that what else the machine does slows both; the medians count.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from compare_loaders import PIPELINES

from vimfast.cli import run_main
from vimfast.speed import measure_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder with train/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement, after a warm-up")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of timm's")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in PIPELINES}
    for _ in range(args.rounds):
        for name, found in rates.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                found.append(alone.submit(measure, name, args).result())
        print(_told({name: found[-1] for name, found in rates.items()}), flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    ratio = medians["vimfast"] / medians["timm"]
    print(
        f"median: {', '.join(f'{name} {rate:,.0f} img/s' for name, rate in medians.items())}: {ratio:.2f} times timm's"
    )


def _told(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:,.0f} img/s" for name, rate in rates.items())


def measure(pipeline: str, args: argparse.Namespace) -> float:
    """Images per second of batches that nobody uses."""
    batches = PIPELINES[pipeline](args, torch.device("cpu"), 0)

    def endless() -> Iterator[int]:
        for epoch in itertools.count():
            for _, labels in batches(epoch):
                yield len(labels)

    rate, _ = measure_batches(endless(), args.seconds)
    return rate


if __name__ == "__main__":
    run_main(main)
