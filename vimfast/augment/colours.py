"""The normalization of ImageNet's models, and the colour of what lies outside an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalization(NamedTuple):
    """(value - mean) / std of each channel, for values in [0, 1]."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: torch.dtype = torch.float32  # of the result; or float16


IMAGENET = Normalization()


def to_pixels(images: Tensor, by: Normalization = IMAGENET) -> np.ndarray:
    """The images that were normalized: [B, 3, H, W] floating -> uint8 [B, H, W, 3], on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (by.mean, by.std))
    values = (images.float().cpu() * std + mean) * 255
    return values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def fill_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """The colour of pixels that a warp brings in from outside, as timm rounds it."""
    return tuple(min(255, round(255 * value)) for value in mean)
