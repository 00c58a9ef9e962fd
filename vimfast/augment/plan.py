"""What is done to each image of a batch, as data: operations on uint8 pixels, then boxes to erase."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np


class Op(enum.IntEnum):
    """What is done to an image. Each op rounds to uint8 as Pillow's does; its arguments are listed after it.

    Those up to EQUALIZE map each value of a channel by a table; the tables of the last three depend on the image.
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
    """What happens to each image of a batch."""

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
