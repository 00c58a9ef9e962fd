"""Is the augmentation timm's, and what does it cost? On your photographs and your device.

    python tools/bench_augment.py imagenet_data/
    python tools/bench_augment.py shards/ --aa rand-m7-n3 --magnitude 5

First each operation of RandAugment at one magnitude, with either sign, against timm's own on Pillow: differences in
levels of 255, and the share of values that differ. Then the time of a batch, decoding apart.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from vimfast.augment import randaugment
from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD, fill_colour
from vimfast.augment.pixels import carry_out
from vimfast.augment.plan import PATCH, Plan
from vimfast.augment.recipe import Recipe
from vimfast.cli import run_main
from vimfast.config import AugmentConfig
from vimfast.data.source import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards folder, or folder tree with train/ and val/")
    parser.add_argument("--split", default="train", choices=["train", "val"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--aa", default=AugmentConfig.aa, help="RandAugment in timm's words")
    parser.add_argument("--magnitude", type=float, default=9.0, help="of the comparison")
    parser.add_argument("--images", type=int, default=16, help="of the comparison")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input-size", type=int, default=224)
    args = parser.parse_args()
    photos = photographs(args.data, args.split, args.images, args.input_size)
    compare(photos, randaugment.parse(args.aa), args.magnitude, args.device)
    batch = photos[np.arange(args.batch_size) % len(photos)]
    bench(torch.from_numpy(batch).to(args.device), args.aa)


def photographs(data: str, split: str, count: int, size: int) -> np.ndarray:  # uint8 [count, size, size, 3]
    """Images spread over the split, their middle in the training size."""
    source = open_source(data, split)
    encoded = source.read(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64)).encoded
    return np.stack([_square(Image.open(io.BytesIO(image.tobytes())).convert("RGB"), size) for image in encoded])


def _square(image: Image.Image, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def compare(photos: np.ndarray, policy: randaugment.RandAugment, magnitude: float, device: str) -> None:
    """A row an operation: ours on the device against timm's."""
    size = photos.shape[1]
    images = torch.from_numpy(photos).to(device)
    print(f"{len(images)} images of {size} x {size}, magnitude {magnitude:g}, {device} against timm")
    print(f"{'operation':22} {'mean':>9} {'largest':>8} {'differ':>9}")
    for name in policy.names:
        differences = []
        for sign in (0.1, 0.9):  # what both take as the uniform number that decides it
            one = randaugment.RandAugment((name,), None, magnitude, 1, 1.0)
            u = np.zeros((len(photos), one.columns))
            u[:, randaugment.SIGN] = sign
            plan = Plan.of(one.draw(u, size), np.zeros((len(photos), 0), PATCH))
            ours = carry_out(images, plan, mean=IMAGENET_MEAN, std=IMAGENET_STD).permute(0, 2, 3, 1).cpu()
            ours = ((ours * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255).round()
            hparams = {"img_mean": fill_colour(IMAGENET_MEAN), "interpolation": Image.Resampling.BICUBIC}
            operation = auto_augment.AugmentOp(name, 1.0, magnitude, hparams)
            with patch.object(random, "random", functools.partial(float, sign)):
                theirs = np.stack([np.asarray(operation(Image.fromarray(image))) for image in photos])
            differences.append((ours - torch.from_numpy(theirs)).abs())
        both = torch.cat(differences)
        print(f"{name:22} {both.mean():9.5f} {both.max():8.0f} {(both > 0).float().mean():9.3%}")


def bench(images: Tensor, aa: str) -> None:
    """A row a recipe: time and memory of a batch, and of drawing its plan."""
    recipes = {
        "normalize only": AugmentConfig(aa="none", color_jitter=0, reprob=0),
        "erase": AugmentConfig(aa="none", color_jitter=0),
        aa: AugmentConfig(aa=aa, reprob=0),
        f"{aa}, erase": AugmentConfig(aa=aa),
        "color jitter, erase": AugmentConfig(aa="none"),
        "ThreeAugment": AugmentConfig(three_augment=True),
    }
    size = images.shape[1]
    print(f"\na batch of {len(images)} images of {size} x {size} on {images.device}")
    print(f"{'augmentation':32} {'ms':>8} {'img/s':>10} {'drawing, ms':>12} {'GPU MiB':>8}")
    for title, cfg in recipes.items():
        recipe, positions = Recipe(cfg), np.arange(len(images))
        plan = recipe.draw(0, 0, positions, size)
        drawing = _seconds(functools.partial(recipe.draw, 0, 0, positions, size), None)
        work = functools.partial(carry_out, images, plan, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        took = _seconds(work, torch.cuda.synchronize if images.is_cuda else None)
        memory = _memory(work) if images.is_cuda else 0.0
        print(f"{title:32} {took * 1e3:8.3f} {len(images) / took:10,.0f} {drawing * 1e3:12.2f} {memory:8.0f}")


def _seconds(work: Callable[[], object], finish: Callable[[], None] | None, least: float = 0.5) -> float:
    """Mean time of a call, over at least `least` seconds after a warm-up."""
    work()
    if finish:
        finish()
    calls, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < least:
        work()
        calls += 1
        if finish and calls % 20 == 0:
            finish()
    if finish:
        finish()
        took = time.perf_counter() - begin
    return took / calls


def _memory(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    run_main(main)
