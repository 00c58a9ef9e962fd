"""Random erasing (Zhong et al., 2017), drawn as timm draws it: boxes of noise or of one colour, once normalized."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vimfast.augment.plan import PATCH
from vimfast.augment.randaugment import normal
from vimfast.config.choices import EraseMode
from vimfast.image_size import ImageSize

AREA = (0.02, 1 / 3)  # of all boxes of an image together, as a share of it
ASPECT = (0.3, 1 / 0.3)  # height over width; log-uniform
TRIES = 10

# An image's columns: whether, how many boxes; then of each box its tries, place, seed of the noise, colour.
_APPLY, _COUNT = 0, 1
_TRIED_AREA, _TRIED_ASPECT = slice(0, TRIES), slice(TRIES, 2 * TRIES)
_TOP, _LEFT, _SEED = 2 * TRIES, 2 * TRIES + 1, 2 * TRIES + 2
_COLOUR = slice(2 * TRIES + 3, 2 * TRIES + 9)
_COLUMNS_PER_BOX = 2 * TRIES + 9


@dataclass(frozen=True)
class Erasing:
    """Erases 1 to `most` boxes in an image with `probability`.

    Args:
        mode: ``"pixel"`` normal noise, ``"rand"`` one normal colour per box, ``"const"`` the mean colour (0).
    """

    probability: float
    mode: EraseMode = "pixel"
    most: int = 1

    @property
    def columns(self) -> int:
        """Uniform numbers that an image needs."""
        return 2 + self.most * _COLUMNS_PER_BOX

    def draw(
        self,
        u: np.ndarray,  # float64 [n, columns]
        size: ImageSize,
    ) -> np.ndarray:  # PATCH [n, most]; those that are not erased are empty
        """The boxes of images of this size. The first of ten tries that fits wins, or none."""
        count = 1 + (u[:, [_COUNT]] * self.most).astype(np.int64)
        erased = (u[:, [_APPLY]] <= self.probability) & (np.arange(self.most) < count)
        boxes = u[:, 2:].reshape(len(u), self.most, _COLUMNS_PER_BOX)
        area = (AREA[0] + (AREA[1] - AREA[0]) * boxes[:, :, _TRIED_AREA]) * size.pixels / count[:, :, None]
        low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
        aspect = np.exp(low + (high - low) * boxes[:, :, _TRIED_ASPECT])
        tried_height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        tried_width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (tried_height < size.height) & (tried_width < size.width)
        first = fits.argmax(axis=2)[:, :, None]
        height = np.take_along_axis(tried_height, first, axis=2)[:, :, 0]
        width = np.take_along_axis(tried_width, first, axis=2)[:, :, 0]
        patches = np.zeros(boxes.shape[:2], PATCH)
        patches["top"] = boxes[:, :, _TOP] * (size.height - height + 1)
        patches["left"] = boxes[:, :, _LEFT] * (size.width - width + 1)
        patches["bottom"], patches["right"] = patches["top"] + height, patches["left"] + width
        patches["seed"] = boxes[:, :, _SEED] * 2**31 if self.mode == "pixel" else -1
        if self.mode == "rand":
            colour = boxes[:, :, _COLOUR]
            patches["fill"] = normal(colour[:, :, :3], colour[:, :, 3:])
        patches[~(erased & fits.any(axis=2))] = np.zeros((), PATCH)
        return patches
