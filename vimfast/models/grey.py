"""What a model of one channel sees of a colour image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R 601, which Pillow's mode L is
GREY_MEAN = (sum(IMAGENET_DEFAULT_MEAN) / 3,)  # 0.449, which timm takes for one channel
GREY_STD = (sum(IMAGENET_DEFAULT_STD) / 3,)  # 0.226


class Grey:
    """Images as the loaders give them, [B, 3, H, W] of ImageNet's normalization, to their luma [B, 1, H, W].

    Args:
        mean, std: that the luma is normalized with, for values in [0, 1]; of one channel, or the means of several.
    """

    def __init__(self, mean: Sequence[float] = GREY_MEAN, std: Sequence[float] = GREY_STD) -> None:
        centre, spread = sum(mean) / len(mean), sum(std) / len(std)
        self._weights = [part * of / spread for part, of in zip(LUMA, IMAGENET_DEFAULT_STD, strict=True)]
        self._bias = (sum(part * of for part, of in zip(LUMA, IMAGENET_DEFAULT_MEAN, strict=True)) - centre) / spread

    def __call__(self, images: Tensor) -> Tensor:
        red, green, blue = images.split(1, dim=1)
        r, g, b = self._weights
        return torch.add(r * red + g * green + b * blue, self._bias)

    def before(self, model: nn.Module) -> None:
        """Have `model` make its images grey whenever it is called."""
        model.register_forward_pre_hook(self._hook)

    def _hook(self, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])
