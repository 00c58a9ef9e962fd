"""How well ``--order window`` shuffles, against a permutation of all images.

    python tools/order_quality.py --windows 8 32 64 128

Simulated on a data set of ImageNet's size in shuffled shards, as vimfast-prepare writes them. Columns: the memory that
two windows take; how many shards a global batch comes from; how much more often two images of one shard meet in a
batch; how uneven the classes of a batch are (chi-square over its degrees of freedom: 1 for independent draws); and how
far an image moves from one epoch to the next, as a share of the epoch (1/3 for independent places).
"""

from __future__ import annotations

import argparse

import numpy as np

from vimfast.cli import run_main
from vimfast.data.order import permutation, windowed_permutation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shard-samples", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024, help="of all processes together")
    parser.add_argument("--image-kb", type=float, default=110, help="mean size of an image")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 32, 64, 128], help="in shards")
    args = parser.parse_args()
    bounds = (*range(0, args.samples, args.shard_samples), args.samples)
    labels = np.random.default_rng(0).permutation(np.arange(args.samples) % args.classes)
    print(f"{'window':>11} {'GB':>6} {'shards':>7} {'meetings':>9} {'classes':>8} {'moves':>7}")
    for window in args.windows:
        orders = [windowed_permutation(0, epoch, bounds, window) for epoch in range(2)]
        memory = 2 * window * args.shard_samples * args.image_kb / 1e6
        print(f"{window:11} {memory:6.0f} {figures(orders, labels, args)}")
    orders = [permutation(0, epoch, args.samples) for epoch in range(2)]
    print(f"{'permutation':>11} {args.samples * args.image_kb / 1e6:6.0f} {figures(orders, labels, args)}")


def figures(orders: list[np.ndarray], labels: np.ndarray, args: argparse.Namespace) -> str:
    batches = orders[0][: args.samples // args.batch * args.batch].reshape(-1, args.batch)
    shards = np.sort(batches // args.shard_samples, axis=1)
    distinct = 1 + (np.diff(shards, axis=1) != 0).sum(axis=1)
    counts = np.stack([np.bincount(row, minlength=len(orders[0]) // args.shard_samples + 1) for row in shards])
    pairs = (counts * (counts - 1)).sum() / len(batches)
    expected = args.batch * (args.batch - 1) * (args.shard_samples - 1) / (args.samples - 1)
    per_class = np.stack([np.bincount(labels[row], minlength=args.classes) for row in batches])
    mean = args.batch / args.classes
    uneven = ((per_class - mean) ** 2 / mean).sum(axis=1).mean() / (args.classes - 1)
    places = [np.argsort(order) for order in orders]
    moves = np.abs(places[0] - places[1]).mean() / args.samples
    return f"{distinct.mean():7.0f} {pairs / expected:8.2f}x {uneven:8.3f} {moves:7.3f}"


if __name__ == "__main__":
    run_main(main)
