"""Does a model learn the same with each backend? The same small Vision Mamba, trained from the same seeds.

    python tools/compare_backends.py cifar10-tree --backends gluon reference --seeds 0 1

Pictures lie on the device, unaugmented, so that nothing but the kernels and the seed differs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vimfast.cli import run_main
from vimfast.config import OptimConfig
from vimfast.data.pipeline import IMAGENET_MEAN, IMAGENET_STD
from vimfast.data.tree import scan_split
from vimfast.models import create_model
from vimfast.optim import build_optimizer
from vimfast.step import TrainStep


def load(root: Path, split: str, size: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """At most `most` pictures of a split [n, 3, size, size], spread over the classes, and their labels [n]."""
    files = scan_split(root, split)
    picked = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))
    rows = []
    for i in picked.tolist():
        with Image.open(files.path(i)) as picture:
            rows.append(np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(np.stack(rows)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std, torch.from_numpy(files.labels[picked].astype(np.int64)).to(device)


def cross_entropy(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def train(
    backend: str, seed: int, args: argparse.Namespace, train_set: tuple[Tensor, Tensor], val_set: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Train, and the losses and the accuracy at the end."""
    torch.manual_seed(seed)
    device = train_set[0].device
    options = {"img_size": args.size, "patch_size": 8, "stride": 8, "depth": 12, "num_classes": 10}
    model = create_model("vim_tiny_patch16_224", scan_backend=backend, drop_path_rate=0.0, **options).to(device).train()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=not args.no_amp, cache_enabled=False)
    optimizer = build_optimizer(OptimConfig(), model, 1e-3)
    step = TrainStep(model, optimizer, cross_entropy, amp=amp)
    images, labels = train_set
    steps = len(images) // args.batch_size
    if device.type == "cuda":
        step.capture(images[: args.batch_size], labels[: args.batch_size])
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for epoch in range(args.epochs):
        total = torch.zeros((), device=device)
        for ids in torch.randperm(len(images), generator=generator)[: steps * args.batch_size].view(steps, -1):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - epoch / args.epochs)
            ids = ids.to(device)
            total += step(images[ids], labels[ids])[0]
    seconds = time.perf_counter() - begin
    with torch.no_grad(), amp:
        model.eval()
        logits = torch.cat([model(part) for part in val_set[0].split(500)]).float()
    return {
        "train_loss": (total / steps).item(),
        "val_loss": F.cross_entropy(logits, val_set[1]).item(),
        "acc1": 100 * (logits.argmax(1) == val_set[1]).float().mean().item(),
        "img_s": args.epochs * steps * args.batch_size / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="folder with train/ and val/, ten classes")
    parser.add_argument("--backends", nargs="+", default=["gluon", "reference"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=10_000, help="of the training split")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--no_amp", action="store_true", help="fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = [load(args.tree, split, args.size, args.pictures, device) for split in ("train", "val")]
    table = Table("backend", "seed", "train loss", "val loss", "top-1 %", "img/s")
    found = []
    for backend in args.backends:
        for seed in args.seeds:
            result = train(backend, seed, args, *data)
            found.append({"backend": backend, "seed": seed, **result})
            table.add_row(
                backend, str(seed), f"{result['train_loss']:.4f}", f"{result['val_loss']:.4f}", f"{result['acc1']:.1f}",
                f"{result['img_s']:,.0f}",
            )  # fmt: skip
            Console(stderr=True).print(found[-1])
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_main(main)
