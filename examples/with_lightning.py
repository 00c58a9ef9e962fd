"""The loader under Lightning, which saves and restores its place with its checkpoints.

python examples/with_lightning.py shards/ --resume lightning/last.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from vimfast import AugmentConfig, Batch, Loader, create_model, evaluation_loader, open_source, training_loader


class Images(lightning.LightningDataModule):
    """Opens the loaders when Lightning asks for them: by then there is a process group, and a rank gets its share."""

    def __init__(self, path: str | Path, batch_size: int = 128, size: int = 224) -> None:
        super().__init__()
        self.path, self.batch_size, self.size = path, batch_size, size
        self.opened: list[Loader] = []

    def train_dataloader(self) -> Loader:
        device = self.trainer.strategy.root_device
        loader = training_loader(
            self.path, self.batch_size, size=self.size, augmentation=AugmentConfig(), device=device
        )
        self.opened.append(loader)
        return loader

    def val_dataloader(self) -> Loader:
        device = self.trainer.strategy.root_device
        loader = evaluation_loader(self.path, self.batch_size, size=self.size, device=device)
        self.opened.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        for loader in self.opened:
            loader.close()


class Classification(lightning.LightningModule):
    """Cross entropy and top-1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        right = (self.model(batch.images).argmax(1) == batch.labels).float()
        self.log("top1", right.mean(), prog_bar=True, batch_size=len(right), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def trainer(folder: Path, epochs: int, save_every: int = 500, **options: Any) -> lightning.Trainer:
    """Saves ``last.ckpt`` in `folder` every so many steps."""
    checkpoints = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=save_every)
    return lightning.Trainer(max_epochs=epochs, callbacks=[checkpoints], default_root_dir=folder, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shards, or a folder with train/<class>/*.jpg and val/<class>/*.jpg")
    parser.add_argument("--folder", type=Path, default=Path("lightning"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", help="a checkpoint of Lightning's")
    args = parser.parse_args()
    classes = open_source(args.data, "train").classes
    module = Classification(create_model("vim_tiny_patch16_224", num_classes=len(classes)))
    trainer(args.folder, args.epochs).fit(module, datamodule=Images(args.data), ckpt_path=args.resume)


if __name__ == "__main__":
    main()
