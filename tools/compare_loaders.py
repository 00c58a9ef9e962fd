"""Does a model learn the same from timm's pipeline on Pillow as from this loader? The same Vision Mamba with each.

    python tools/compare_loaders.py cifar10-tree --seeds 0 1 2 --epochs 10

Both draw the recipe's random resized crop, flip, RandAugment and random erasing; model, order of training, learning
rate and the images that are evaluated are the same, and nothing is mixed.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from comparison import Epochs, Findings, load_images, train
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from vimfast.cli import run_main
from vimfast.config import AugmentConfig
from vimfast.data.loader import Loader
from vimfast.data.order import Order
from vimfast.data.source import open_source
from vimfast.data.views import training_view


def posterize_to_black(posterize: Any, image: Any, bits_to_keep: int, **rest: Any) -> Any:
    """timm's posterize, but black where no bit is kept, as Pillow had it: since 13 it raises."""
    return posterize(image, bits_to_keep, **rest) if bits_to_keep > 0 else image.point(lambda _: 0)


def timm_batches(args: argparse.Namespace, device: torch.device, seed: int) -> Epochs:
    recipe = AugmentConfig()
    transform = create_transform(
        args.size, is_training=True, color_jitter=recipe.color_jitter, auto_augment=recipe.aa, interpolation="bicubic",
        re_prob=recipe.reprob, re_mode=recipe.remode, re_count=recipe.recount,
    )  # fmt: skip
    loader = DataLoader(
        ImageFolder(str(args.tree / "train"), transform), args.batch_size, shuffle=True, drop_last=True,
        num_workers=args.workers, persistent_workers=True, pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed), multiprocessing_context="spawn",
    )  # fmt: skip

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return batches


def our_batches(args: argparse.Namespace, device: torch.device, seed: int) -> Epochs:
    source = open_source(args.tree, "train")
    order = Order(len(source), args.batch_size, shuffle=True, drop_last=True, seed=seed)
    return Loader(source, training_view(order, device, AugmentConfig(), size=args.size)).epoch


PIPELINES = {"timm": timm_batches, "vimfast": our_batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder with train/ and val/, ten classes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of timm's")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    val_set = load_images(args.tree, "val", args.size, 10_000, device)
    options = {
        "img_size": args.size, "patch_size": args.patch, "stride": args.patch, "depth": args.depth, "num_classes": 10,
    }  # fmt: skip
    findings = Findings(args.json)
    for seed in args.seeds:
        for name, pipeline in PIPELINES.items():
            batches = functools.partial(pipeline, args, device, seed)
            found = train(options, seed, args.epochs, (args.batch_size, args.size), batches, val_set)
            findings.add(name, seed, **found)
    findings.show()


OPERATIONS: dict[str, Any] = NAME_TO_OP
for name in [name for name in OPERATIONS if name.startswith("Posterize")]:  # here, so that workers have it too
    OPERATIONS[name] = functools.partial(posterize_to_black, OPERATIONS[name])


if __name__ == "__main__":
    run_main(main)
