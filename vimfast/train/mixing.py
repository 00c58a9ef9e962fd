"""Mixup and cutmix on the device, drawn as timm draws them: images and labels in, images and soft targets out.

Mixup (Zhang et al., 2018): x = lam x1 + (1 - lam) x2, lam ~ Beta(alpha, alpha). Cutmix (Yun et al., 2019): a box of
area 1 - lam comes from x2. The partner of an image is its mirror in the batch, x2 = flip(x1, dim 0), or in its group if
the batch is mixed in groups. Draws are a function of (seed, step, rank), so a resumed run repeats them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vimfast.config import MixConfig
from vimfast.data.relabelling import read_soft_targets
from vimfast.data.source import Source

_STREAM = 0x6D69  # keeps these draws apart from those of the order and of the augmentation


class Mixup:
    """Draws how to mix a batch, and mixes it.

    Args:
        cfg: alphas, probabilities, mode (one draw for each batch, pair or element) and label smoothing.
        num_classes: columns of the targets.
        seed: with the step and the rank, fixes the draws.
        rank: this process.
        table: targets of the training images, float [N, num_classes]; labels are then the images' numbers.
    """

    def __init__(self, cfg: MixConfig, num_classes: int, seed: int, rank: int, table: np.ndarray | None = None) -> None:
        self.cfg, self.num_classes, self.seed, self.rank = cfg, num_classes, seed, rank
        self._table = None if table is None else torch.from_numpy(table)

    def as_in(self, cfg: MixConfig) -> Mixup:
        """The same with other settings, those of a stage; of the same classes and targets."""
        other = copy.copy(self)
        other.cfg = cfg
        return other

    @property
    def enabled(self) -> bool:
        return self.cfg.mixup > 0 or self.cfg.cutmix > 0 or self.cfg.cutmix_minmax is not None

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images: [B, C, H, W], any float dtype; not changed.
            labels: [B] int64; with a table, numbers of images.
            step: steps done since the start of the run.

        Returns:
            images [B, C, H, W] and targets [B, num_classes], float32, each row summing to 1 (but for BCE, whose
            targets are 0 or 1, or the table's). With mixup and cutmix both off, the targets are the smoothed labels.
        """
        targets = self._targets(labels)
        if not self.enabled:
            return images, targets
        rng = np.random.default_rng((self.seed, _STREAM, step, self.rank))
        group = self.cfg.mixup_group or len(images)
        groups = zip(images.split(group), targets.split(group), strict=True)
        mixed = [self._mix_group(rng, *own) for own in groups]
        images, targets = mixed[0] if len(mixed) == 1 else map(torch.cat, zip(*mixed, strict=True))
        classes_present = self.cfg.bce_loss and self._table is None
        return images, (targets > 0).float() if classes_present else targets

    def _mix_group(self, rng: np.random.Generator, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        lam, boxes = self.draw(rng, len(images), images.shape[2], images.shape[3])
        if (lam < 1).any():
            images = self._mix(images, lam, boxes)
        if self.cfg.mixup_mode == "batch":
            return images, torch.lerp(targets.flip(0), targets, float(lam[0]))
        weight = torch.from_numpy(lam).to(images.device, torch.float32, non_blocking=True)[:, None]
        return images, torch.lerp(targets.flip(0), targets, weight)

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """How to mix: ``lam`` [B] float64, the weight of each image's own label (1: not mixed), and ``boxes``
        [B, 4] int64 (top, bottom, left, right), pasted from the partner where they hold a pixel; where they
        don't, images are blended by ``lam``.
        """
        cfg = self.cfg
        draws = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[cfg.mixup_mode]
        has_cutmix = cfg.cutmix > 0 or cfg.cutmix_minmax is not None
        cut = np.full(draws, has_cutmix)
        if has_cutmix and cfg.mixup > 0:
            cut = rng.random(draws) < cfg.mixup_switch_prob
        alpha = np.where(cut, cfg.cutmix if cfg.cutmix > 0 else 1.0, cfg.mixup if cfg.mixup > 0 else 1.0)
        lam = rng.beta(alpha, alpha)
        mixed = rng.random(draws) < cfg.mixup_prob
        boxes = self._boxes(rng, lam, height, width) * (cut & mixed)[:, None]
        area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        lam = np.where(mixed, np.where(cut, 1 - area / (height * width), lam), 1.0)
        if cfg.mixup_mode == "pair":  # image i and its partner B-1-i share a draw
            share = np.minimum(np.arange(batch), batch - 1 - np.arange(batch))
        else:
            share = np.arange(batch) % draws
        return lam[share], boxes[share]

    def _boxes(self, rng: np.random.Generator, lam: np.ndarray, height: int, width: int) -> np.ndarray:
        if self.cfg.cutmix_minmax is not None:
            least, most = self.cfg.cutmix_minmax
            rows = rng.integers(int(height * least), max(int(height * most), int(height * least) + 1), len(lam))
            columns = rng.integers(int(width * least), max(int(width * most), int(width * least) + 1), len(lam))
            top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
            return np.stack([top, top + rows, left, left + columns], 1)
        side = np.sqrt(1 - lam)
        rows, columns = (height * side).astype(np.int64) // 2, (width * side).astype(np.int64) // 2
        y, x = rng.integers(0, height, len(lam)), rng.integers(0, width, len(lam))
        limits = (height, height, width, width)
        return np.stack(
            [np.clip(v, 0, m) for v, m in zip((y - rows, y + rows, x - columns, x + columns), limits, strict=True)],
            1,
        )

    def _mix(self, images: Tensor, lam: np.ndarray, boxes: np.ndarray) -> Tensor:
        pasted = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
        if self.cfg.mixup_mode == "batch":
            if not pasted[0]:
                return torch.lerp(images.flip(0), images, float(lam[0]))
            top, bottom, left, right = boxes[0].tolist()
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
            return mixed
        partners = images.flip(0)
        weight = np.where(pasted, 1.0, lam)
        w = torch.from_numpy(weight).to(images.device, images.dtype, non_blocking=True)[:, None, None, None]
        box = torch.from_numpy(boxes).to(images.device, non_blocking=True)[:, :, None]
        y, x = (
            torch.arange(images.shape[2], device=images.device),
            torch.arange(images.shape[3], device=images.device),
        )
        inside_y = (y >= box[:, 0]) & (y < box[:, 1])  # [B, H]
        inside_x = (x >= box[:, 2]) & (x < box[:, 3])  # [B, W]
        inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]  # [B, 1, H, W]
        return torch.where(inside, partners, images * w + partners * (1 - w))

    def _targets(self, labels: Tensor) -> Tensor:
        # A smoothed target is above 0 everywhere, which would make every class a target of BCE.
        smoothing = 0.0 if self.cfg.bce_loss else self.cfg.smoothing
        off = smoothing / self.num_classes
        if self._table is not None:
            self._table = self._table.to(labels.device)  # once
            return self._table[labels].float() * (1 - smoothing) + off
        targets = torch.full((len(labels), self.num_classes), off, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def build_mixup(cfg: MixConfig, source: Source, seed: int, rank: int) -> Mixup:
    """The mixing of a run that trains on these images.

    Raises:
        UserError: ``soft_targets`` are not theirs.
    """
    table = None
    if cfg.soft_targets:
        table = read_soft_targets(Path(cfg.soft_targets), source, sums_to_one=not cfg.bce_loss)
    return Mixup(cfg, len(source.classes), seed, rank, table)
