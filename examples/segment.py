"""Semantic segmentation on a Vision Mamba's feature maps: handwritten digits on a canvas, a class for each pixel.

python examples/segment.py            # trains for some minutes on a CPU

A Vision Mamba keeps its resolution from the first block to the last, so all its maps have one stride. The head makes
levels of three strides of them, as those of plain transformers do (arXiv:2203.16527), and joins the levels from coarse
to fine, as a feature pyramid does (FPN, arXiv:1612.03144). It is trained on images of two sizes in turn, and evaluated
on both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vimfast import create_model

BACKGROUND, CLASSES = 0, 11  # class 1 is the digit 0, and so on


class Segmenter(nn.Module):
    """A backbone and the head on it.

    Args:
        backbone: of ``create_model(..., features_only=True)``, with three maps or more; the last three are taken.
        classes: of a pixel.
        width: channels of the head.
    """

    def __init__(self, backbone: Any, classes: int, width: int = 48) -> None:
        super().__init__()
        self.backbone = backbone
        fine, same, coarse = backbone.feature_info.channels()[-3:]
        # From the backbone's stride s to s / 2, s and 2 s. The first map, the least abstract, gets the most detail.
        self.levels = nn.ModuleList(
            [
                nn.ConvTranspose2d(fine, width, kernel_size=2, stride=2),
                nn.Conv2d(same, width, kernel_size=1),
                nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(coarse, width, kernel_size=1)),
            ]
        )
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())
        self.classify = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] to the logits of each pixel, float [B, classes, H, W]."""
        fine, same, coarse = (level(own) for level, own in zip(self.levels, self.backbone(images)[-3:], strict=True))
        joined = same + F.interpolate(coarse, size=same.shape[2:], mode="nearest")
        joined = fine + F.interpolate(joined, size=fine.shape[2:], mode="nearest")
        logits = self.classify(self.smooth(joined))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")


class Batch(NamedTuple):
    images: Tensor  # float32 [B, 3, S, S]
    classes: Tensor  # int64 [B, S, S]


class Canvases:
    """Draws digits from scikit-learn on canvases of noise; one in five digits is kept for validation."""

    def __init__(self, *, validation: bool, digits: Sequence[int] = range(10)) -> None:
        scans = load_digits()
        of_split = (np.arange(len(scans.target)) % 5 == 0) == validation
        chosen = of_split & np.isin(scans.target, digits)
        self._scans = torch.from_numpy(scans.images[chosen] / 16).float()[:, None]  # [N, 1, 8, 8], 0 to 1
        self._labels = torch.from_numpy(scans.target[chosen])

    def draw(self, count: int, size: int, seed: int) -> Batch:
        """`count` canvases of `size` pixels, always the same ones for a seed."""
        rng = np.random.default_rng(seed)
        images = torch.from_numpy(0.15 * rng.random((count, size, size), np.float32))
        classes = torch.full((count, size, size), BACKGROUND)
        for image, own in zip(images, classes, strict=True):
            for _ in range((size // 16) ** 2):
                number, side = int(rng.integers(len(self._scans))), int(rng.integers(12, 19))
                top, left = (int(at) for at in rng.integers(0, size - side + 1, 2))
                scan = F.interpolate(self._scans[number : number + 1], size=(side, side), mode="bilinear")[0, 0]
                ink, place = scan > 0.4, (slice(top, top + side), slice(left, left + side))
                image[place] = torch.where(ink, scan, image[place])
                own[place] = torch.where(ink, 1 + self._labels[number], own[place])
        return Batch(images[:, None].expand(-1, 3, -1, -1) - 0.5, classes)


def train(model: nn.Module, canvases: Canvases, sizes: Sequence[int], steps: int, *, batch: int = 16) -> None:
    """Train on canvases of these sizes in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        images, classes = canvases.draw(batch, sizes[step % len(sizes)], seed=step)
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def intersection_over_union(model: nn.Module, batch: Batch, classes: int = CLASSES) -> Tensor:
    """Of each class, float [classes], NaN for those that are neither there nor predicted."""
    model.eval()
    predicted = model(batch.images).argmax(1)
    pairs = torch.bincount((classes * batch.classes + predicted).flatten(), minlength=classes * classes)
    counts = pairs.view(classes, classes).float()  # [true, predicted]
    shared = counts.diagonal()
    return shared / (counts.sum(0) + counts.sum(1) - shared)


def build(size: int) -> Segmenter:
    """A backbone of 0.1 million parameters with patches of 4 pixels, for canvases of about `size` pixels."""
    backbone = create_model(
        "vim_tiny_patch16_224",
        features_only=True,
        out_indices=(1, 2, 3),
        img_size=size,
        dynamic_img_size=True,  # images of other sizes too
        patch_size=4,
        stride=4,
        embed_dim=48,
        depth=4,
    )
    return Segmenter(backbone, CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 48], help="sides of the canvases [32 48]")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.sizes[0])
    train(model, Canvases(validation=False), args.sizes, args.steps)
    for size in args.sizes:
        found = intersection_over_union(model, Canvases(validation=True).draw(64, size, seed=0))
        print(
            f"{size} pixels: mean IoU {100 * found.nanmean():.1f} %, of the background {100 * found[BACKGROUND]:.1f} %"
        )


if __name__ == "__main__":
    main()
