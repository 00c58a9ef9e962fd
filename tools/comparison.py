"""What the tools share that train one small Vision Mamba several ways: the training, and the verdict over seeds."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.config import OptimConfig
from vimfast.files import write_text
from vimfast.models import create_model
from vimfast.shards.tree import scan_split
from vimfast.train.optim import build_optimizer
from vimfast.train.step import TrainStep

PEAK_LR = 1e-3
Epochs = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # epoch -> images [B, 3, S, S] and labels [B]


def load_images(root: Path, split: str, size: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """At most `most` images of a split, resized and normalized [n, 3, size, size], spread over the classes, and
    their labels [n]."""
    files = scan_split(root, split)
    picked = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))
    rows = []
    for i in picked.tolist():
        with Image.open(files.path(i)) as image:
            rows.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.stack(rows)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std, torch.from_numpy(files.labels[picked].astype(np.int64)).to(device)


def cross_entropy(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def train(
    options: dict[str, Any],
    seed: int,
    epochs: int,
    batch: tuple[int, int],  # size, side of the images
    batches: Callable[[], Epochs],
    val_set: tuple[Tensor, Tensor],
    bf16: bool = True,
) -> dict[str, float]:
    """Train a Vim-Tiny with these options, the learning rate falling to 0 on half a cosine.

    Args:
        batches: called after the capture of the step, since no other thread may use the GPU before.

    Returns:
        the mean training loss of the last epoch; loss and top-1 accuracy (percent) on `val_set`; images per second of
        training, without the first epoch where there are more.
    """
    torch.manual_seed(seed)
    device = val_set[0].device
    model = create_model("vim_tiny_patch16_224", drop_path_rate=0.0, **options).to(device).train()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    optimizer = build_optimizer(OptimConfig(), model, PEAK_LR)
    step = TrainStep(model, optimizer, cross_entropy, amp=amp)
    if device.type == "cuda":
        size, side = batch
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        step.capture(torch.zeros(size, 3, side, side, device=device), labels)
    one_epoch = batches()
    seconds, shown, total, steps = 0.0, 0, torch.zeros((), device=device), 0
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total.zero_()
        steps, begin = 0, time.perf_counter()
        for images, labels in one_epoch(epoch):
            total += step(images, labels)[0]
            steps += 1
        mean = total.item() / steps
        if epoch or epochs == 1:
            seconds, shown = seconds + time.perf_counter() - begin, shown + steps * batch[0]
    with torch.no_grad(), amp:
        model.eval()
        logits = torch.cat([model(part) for part in val_set[0].split(500)]).float()
    return {
        "train_loss": mean,
        "val_loss": F.cross_entropy(logits, val_set[1]).item(),
        "acc1": 100 * (logits.argmax(1) == val_set[1]).float().mean().item(),
        "img_s": shown / seconds,
    }


class Findings:
    """What was found so far, printed as it comes and kept on disk, so that a run cut off has lost nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, variant: str, seed: int, **found: float) -> None:
        self.rows.append({"variant": variant, "seed": seed, **found})
        Console(stderr=True).print(self.rows[-1])
        if self.path is not None:
            write_text(self.path, json.dumps(self.rows, indent=1) + "\n")

    def show(self) -> None:
        table = Table("variant", "seed", "train loss", "val loss", "top-1 %", "img/s")
        for row in self.rows:
            table.add_row(
                row["variant"], str(row["seed"]), f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}",
                f"{row['acc1']:.2f}", f"{row['img_s']:,.0f}",
            )  # fmt: skip
        console = Console(width=110)
        console.print(table)
        variants = list(dict.fromkeys(row["variant"] for row in self.rows))
        for name, unit in (("acc1", "top-1 %"), ("val_loss", "validation loss"), ("train_loss", "training loss")):
            values = {v: [row[name] for row in self.rows if row["variant"] == v] for v in variants}
            for variant, theirs in values.items():
                if variant != variants[0]:
                    console.print(f"{unit}: {verdict(variants[0], values[variants[0]], variant, theirs)}")


def verdict(first: str, a: list[float], second: str, b: list[float]) -> str:
    """Whether two means differ by no more than seeds make them differ: twice the difference's standard error."""
    difference = statistics.mean(b) - statistics.mean(a)
    means = f"{first} {statistics.mean(a):.4g}, {second} {statistics.mean(b):.4g}"
    if len(a) < 2 or len(b) < 2:
        return f"{means}; one seed shows no spread"
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    within = "within" if abs(difference) <= 2 * error else "beyond"
    spread = ", ".join(f"{min(v):.4g} to {max(v):.4g}" for v in (a, b))
    return f"{means} ({spread}): a difference of {difference:+.3g}, {within} twice its standard error of {error:.2g}"
