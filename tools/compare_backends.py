"""Does a model learn the same with each backend and precision? One Vision Mamba, trained from the same seeds.

    python tools/compare_backends.py cifar10-tree --variants gluon reference --seeds 0 1
    python tools/compare_backends.py cifar10-tree --variants gluon gluon:fp32 --size 128 --patch 16 --seeds 0 1 2

Images lie on the device, unaugmented, so that nothing but the arithmetic and the seed differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from comparison import Epochs, Findings, load_images, train
from torch import Tensor

from vimfast.cli import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder with train/ and val/, ten classes")
    parser.add_argument("--variants", nargs="+", default=["gluon", "reference"], help="BACKEND or BACKEND:fp32")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="of the training split")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (images, labels), val_set = (load_images(args.tree, s, args.size, args.images, device) for s in ("train", "val"))
    options = {
        "img_size": args.size, "patch_size": args.patch, "stride": args.patch, "depth": args.depth, "num_classes": 10,
    }  # fmt: skip

    def shuffled(seed: int) -> Epochs:
        generator = torch.Generator().manual_seed(seed)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            order = torch.randperm(len(images), generator=generator).to(device)
            for ids in order[: len(order) // args.batch_size * args.batch_size].split(args.batch_size):
                yield images[ids], labels[ids]

        return batches

    findings = Findings(args.json)
    for seed in args.seeds:
        for variant in args.variants:
            backend, _, precision = variant.partition(":")
            found = train(
                options | {"scan_backend": backend}, seed, args.epochs, (args.batch_size, args.size),
                partial(shuffled, seed), val_set, bf16=precision != "fp32",
            )  # fmt: skip
            findings.add(variant, seed, **found)
    findings.show()


if __name__ == "__main__":
    run_main(main)
