"""The loader under Accelerate, which saves and restores its place with everything else.

accelerate launch examples/with_accelerate.py shards/ --folder accelerate      # again to resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from vimfast import AugmentConfig, Loader, create_model, training_loader


def train(
    accelerator: Accelerator, model: nn.Module, loader: Loader, folder: Path, epochs: int, save_every: int = 500
) -> None:
    """Train to the end of `epochs`, from what `folder` holds; it is written every so many steps.

    The loader is not prepared by Accelerate: it hands out each rank's share, on its device, as it is.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(loader)
    if folder.exists():
        accelerator.load_state(str(folder))
    for epoch in range(loader.place.epoch, epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if loader.place.step % save_every == 0:
                accelerator.save_state(str(folder))
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards, or a folder with train/<class>/*.jpg")
    parser.add_argument("--folder", type=Path, default=Path("accelerate"))
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    accelerator = Accelerator()  # before the loader, which asks its process group for the rank
    with training_loader(args.data, batch_size=128, augmentation=AugmentConfig(), device=accelerator.device) as loader:
        model = create_model("vim_tiny_patch16_224", num_classes=len(loader.source.classes))
        train(accelerator, model, loader, args.folder, args.epochs)


if __name__ == "__main__":
    main()
