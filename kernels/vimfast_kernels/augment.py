"""Drawn changes of uint8 pictures, then normalization and erasing: a plan for each picture in, a training batch out.

Nothing is drawn here but the noise of erased boxes, which a seed in the plan fixes. On a GPU plain Triton kernels do
the work, everywhere else Pillow itself does.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Op(enum.IntEnum):
    """What is done to a picture. Each op rounds to uint8 as Pillow's does; its arguments stand behind it.

    Those up to EQUALIZE map each value of a channel by a table; the tables of the last three depend on the picture.
    """

    NONE = 0
    INVERT = 1
    POSTERIZE = 2  # bits to keep, 0 to 8; of 0 bits, which Pillow 13 refuses, black remains
    SOLARIZE = 3  # the lowest level to invert
    SOLARIZE_ADD = 4  # levels added to those below 128
    BRIGHTNESS = 5  # factor of PIL.ImageEnhance, which blends: 0 black, 1 unchanged
    CONTRAST = 6  # factor: 0 the mean grey, 1 unchanged
    AUTOCONTRAST = 7
    EQUALIZE = 8
    COLOR = 9  # factor: 0 grey, 1 unchanged
    SHARPNESS = 10  # factor: 0 smoothed, 1 unchanged
    AFFINE = 11  # a, b, c, d, e, f: pixel (x, y) comes from (ax + by + c, dx + ey + f), else it is the fill colour
    BOX_X = 12  # radius of a running mean along a row, which need not be whole; one pass of Pillow's box blur
    BOX_Y = 13  # the same along a column
    SHIFT = 14  # dx, dy: pixel (x, y) comes from (x + dx, y + dy), mirrored at the border


OPERATION = np.dtype([("code", "i8"), ("cubic", "i8"), ("args", "f8", 6)])
"""An op and its arguments; `cubic` chooses AFFINE's filter: 1 bicubic (Pillow's, with a = -1), 0 bilinear."""

PATCH = np.dtype([("top", "i8"), ("bottom", "i8"), ("left", "i8"), ("right", "i8"), ("seed", "i8"), ("fill", "f8", 3)])
"""A box to erase: normal noise from `seed`, or the normalized colour `fill` where the seed is negative."""


class Plan(NamedTuple):
    """What happens to each picture of a batch."""

    operations: np.ndarray  # OPERATION [B, S], S >= 1: done in this order; NONE only before the others
    patches: np.ndarray  # PATCH [B, R], R >= 0: erased in this order

    @classmethod
    def of(cls, operations: np.ndarray, patches: np.ndarray) -> Plan:
        """From operations (OPERATION [B, any]) with NONE anywhere: those that do something move to the end."""
        active = operations["code"] != Op.NONE
        order = np.argsort(active, axis=1, kind="stable")
        slots = max(1, int(active.sum(axis=1).max(initial=0)))
        missing = max(0, slots - operations.shape[1])
        packed = np.take_along_axis(operations, order, axis=1)[:, max(0, operations.shape[1] - slots) :]
        return cls(np.pad(packed, ((0, 0), (0, missing))) if missing else packed, patches)

    @classmethod
    def nothing(cls, batch: int) -> Plan:
        """Normalization only."""
        return cls(np.zeros((batch, 1), OPERATION), np.zeros((batch, 0), PATCH))


def augment(
    images: Tensor,  # uint8 [B, H, W, 3]
    plan: Plan,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, 3, H, W]
    """(picture / 255 - mean) / std of the changed pictures, boxes erased behind that.

    Args:
        images: contiguous; not changed.
        plan: for the batch's pictures, in their order.
        mean, std: of the three channels, for values in [0, 1]. Warps fill with round(255 mean).
        dtype: of the result, a floating one.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; want torch.uint8 [B, H, W, 3]")
    if len(plan.operations) != len(images) or len(plan.patches) != len(images):
        raise ValueError(f"the plan is for {len(plan.operations)} pictures and there are {len(images)}")
    if plan.operations.dtype != OPERATION or plan.patches.dtype != PATCH:
        raise ValueError("a plan holds arrays of OPERATION and PATCH; make it with Plan.of")
    if images.is_cuda:
        from vimfast_kernels import augment_triton

        with torch.cuda.device(images.device):
            return augment_triton.augment(images, plan, mean, std, dtype)
    from vimfast_kernels import augment_pillow

    return augment_pillow.augment(images, plan, mean, std, dtype)


def fill_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """The colour of pixels that a warp brings in from outside, as timm rounds it."""
    return tuple(min(255, round(255 * value)) for value in mean)
