"""Crops on a CPU, by torch's resize of 8-bit images: five times as fast as Pillow's, where torch has it in vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vimfast.augment.threads import Threads
from vimfast.image_size import ImageSize


def crop_resize(
    images: Sequence[Tensor],
    which: np.ndarray,
    boxes: np.ndarray,
    mirror: np.ndarray,
    cubic: np.ndarray,
    size: ImageSize,
    threads: Threads,
) -> Tensor:
    """:func:`vimfast.augment.resize.crop_resize` on a CPU."""
    out, pixels = np.empty((len(which), *size, 3), np.uint8), [image.numpy() for image in images]

    def one(k: int) -> None:
        top, left, height, width = boxes[k].tolist()
        box = pixels[which[k]][top : top + height, left : left + width]
        _place(out[k], resized(box, size, bool(cubic[k])), 0, 0, bool(mirror[k]))

    threads.each(one, len(which))
    return torch.from_numpy(out)


def resize_cut(
    images: Sequence[Tensor],  # uint8 [h_i, w_i, 3]
    sizes: np.ndarray,  # float32 [n, 2]: height, width
    corners: np.ndarray,  # int32 [n, 2]: top, left
    mirror: np.ndarray,  # [n]
    cubic: np.ndarray,  # [n]
    size: ImageSize,
    threads: Threads,
) -> Tensor:  # uint8 [n, height, width, 3] of size
    """Whole images resized, then boxes of one size cut out at the corners; black where they lie outside.

    Args:
        sizes: to resize to, whole numbers; an image of that size stays as it is.
        mirror: left and right of the boxes change places.
        cubic: Pillow's bicubic filter, or its bilinear one.
        size: of the boxes, pixels.
        threads: that share out the images.
    """
    out = np.zeros((len(images), *size, 3), np.uint8)

    def one(k: int) -> None:
        height, width = sizes[k].astype(int).tolist()
        whole = resized(images[k].numpy(), (height, width), bool(cubic[k]))
        top, left = corners[k].tolist()
        shown = whole[max(top, 0) : top + size.height, max(left, 0) : left + size.width]
        down, right = max(-top, 0), max(-left, 0)
        _place(out[k], shown, down, right, bool(mirror[k]))

    threads.each(one, len(images))
    return torch.from_numpy(out)


def _place(out: np.ndarray, image: np.ndarray, top: int, left: int, mirror: bool) -> None:
    """Put an image into `out` at this place, then change left and right of `out`."""
    bottom, right = top + image.shape[0], left + image.shape[1]
    if mirror:
        for channel in range(3):  # numpy moves single bytes faster than pixels of three
            out[:, ::-1, channel][top:bottom, left:right] = image[:, :, channel]
    else:
        out[top:bottom, left:right] = image


def resized(
    image: np.ndarray,  # uint8 [h, w, 3]
    size: tuple[int, int],
    cubic: bool,
) -> np.ndarray:  # uint8 [height, width, 3]
    """``Image.resize`` to (height, width), one direction after the other, by Pillow's bicubic or bilinear filter."""
    if image.shape[:2] == size:
        return image
    if torch.backends.cpu.get_cpu_capability() not in _VECTORIZED:
        return _by_pillow(image, size, cubic)
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    # As a batch in channels-last order, the only one that torch neither unpacks nor packs again.
    batch = pixels[None].permute(0, 3, 1, 2)
    out = F.interpolate(batch, size, mode="bicubic" if cubic else "bilinear", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


_VECTORIZED = ("AVX2", "AVX512")  # elsewhere torch takes several times as long as Pillow


def _by_pillow(image: np.ndarray, size: tuple[int, int], cubic: bool) -> np.ndarray:
    height, width = size
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    # One direction at a time: the order must not depend on Pillow's version.
    wide = Image.fromarray(np.ascontiguousarray(image)).resize((width, image.shape[0]), resample)
    return np.asarray(wide.resize((width, height), resample))
