"""A plain training loop that may be stopped anywhere and continues with the batch that comes next.

python examples/plain_torch.py shards/ --checkpoint plain.pt      # again to resume
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vimfast import AugmentConfig, Loader, create_model, training_loader


def train(model: nn.Module, loader: Loader, checkpoint: Path, epochs: int, save_every: int = 500) -> None:
    """Train to the end of `epochs`, from the checkpoint if there is one; it is written every so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
    for epoch in range(loader.place.epoch, epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loader.place.step % save_every == 0:  # at the end of an epoch, too: the next place is (epoch + 1, 0)
                aside = checkpoint.with_suffix(".new")
                torch.save({name: part.state_dict() for name, part in parts.items()}, aside)
                os.replace(aside, checkpoint)  # so that a crash leaves either the old one or the new one
        print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards, or a folder with train/<class>/*.jpg")
    parser.add_argument("--checkpoint", type=Path, default=Path("plain.pt"))
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    with training_loader(args.data, batch_size=128, augmentation=AugmentConfig()) as loader:
        model = create_model("vim_tiny_patch16_224", num_classes=len(loader.source.classes)).to(loader.device)
        train(model, loader, args.checkpoint, args.epochs)


if __name__ == "__main__":
    main()
