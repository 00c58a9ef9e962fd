"""Boxes cut out of decoded images, resized to one size and mirrored, as Pillow does it.

On a GPU plain Triton kernels do the work and the bytes are Pillow's. On a CPU torch does it, in 16-bit fixed point: a
value is at most 2 levels off, and 997 of 1,000 are Pillow's. Widths are resized first, then heights, with 8 bits in
between. Recent versions of Pillow begin with the height where it shrinks much more than the width: a value of such a
box may then be a level off (a few where noise is shrunk and enlarged).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vimfast.augment import resize_cpu
from vimfast.augment.threads import ALONE, Threads
from vimfast.image_size import ImageSize, SizeLike


def crop_resize(
    images: Sequence[Tensor],  # uint8 [h_i, w_i, 3]
    which: np.ndarray,  # int64 [n]
    boxes: np.ndarray,  # int32 [n, 4]: top, left, height, width
    mirror: np.ndarray,  # int32 [n]
    cubic: np.ndarray,  # int32 [n]
    size: SizeLike,
    threads: Threads = ALONE,
) -> Tensor:  # uint8 [n, height, width, 3] of size
    """``Image.crop``, ``Image.resize`` to the width, then to the height too, and a mirror image.

    On a GPU the work is given to the current stream of the images' device and the host does not wait for it. Memory
    that another stream's work may take over needs `record_stream`, as with any op.

    Args:
        images: contiguous, on one device; of any sizes; not changed.
        which: the image that crop k is cut from.
        boxes: inside that image, in pixels; nothing outside a box has a part in its crop.
        mirror: 1 swaps left and right, after the resizing.
        cubic: 1 for Pillow's bicubic filter (a = -0.5), 0 for its bilinear one; both widen where they shrink a box.
        size: of what comes out, pixels.
        threads: that share out the boxes on a CPU.

    Raises:
        ValueError: shapes, types or devices that do not fit, or a box that is empty or not inside its image.
    """
    device = images[0].device if images else torch.device("cpu")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.is_contiguous():
            raise ValueError(
                f"an image is {image.dtype} {tuple(image.shape)}; must be contiguous torch.uint8 [h, w, 3]"
            )
        if image.device != device:
            raise ValueError(f"images are on {device} and on {image.device}; they must be on one device")
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    if device.type == "cuda":
        addresses = np.array([image.data_ptr() for image in images], np.int64)
        return crop_resize_at(addresses, sizes, which, boxes, mirror, cubic, size, device)
    size = ImageSize.of(size)
    _check(sizes, which, boxes, mirror, cubic, size)
    return resize_cpu.crop_resize(images, which, boxes, mirror, cubic, size, threads)


def crop_resize_at(
    addresses: np.ndarray,  # int64 [m]
    sizes: np.ndarray,  # int64 [m, 2]: height, width
    which: np.ndarray,  # int64 [n]
    boxes: np.ndarray,  # int32 [n, 4]: top, left, height, width
    mirror: np.ndarray,  # int32 [n]
    cubic: np.ndarray,  # int32 [n]
    size: SizeLike,
    device: torch.device,
) -> Tensor:  # uint8 [n, height, width, 3] of size
    """:func:`crop_resize` of images known by their addresses on a GPU: uint8, contiguous rows of 3 * width bytes.

    The memory must stay as it is until the current stream of `device` has done this call's work.

    Raises:
        ValueError: shapes or types that do not fit, a device that is not a GPU, or a box that is empty or not inside
            its image.
    """
    if device.type != "cuda":
        raise ValueError(f"the images' addresses are on {device}; they must be on a CUDA device")
    if addresses.shape != (len(sizes),):
        raise ValueError(f"addresses are {addresses.shape} for {len(sizes)} images")
    size = ImageSize.of(size)
    _check(sizes, which, boxes, mirror, cubic, size)
    from vimfast.augment import resize_triton

    with torch.cuda.device(device):
        return resize_triton.crop_resize(addresses, sizes, which, boxes, mirror, cubic, size, device)


def _check(
    sizes: np.ndarray, which: np.ndarray, boxes: np.ndarray, mirror: np.ndarray, cubic: np.ndarray, size: ImageSize
) -> None:
    n = len(which)
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes are {sizes.shape}; they must be [m, 2]")
    if which.shape != (n,) or boxes.shape != (n, 4) or mirror.shape != (n,) or cubic.shape != (n,):
        shapes = f"{which.shape}, {boxes.shape}, {mirror.shape}, {cubic.shape}"
        raise ValueError(f"which, boxes, mirror and cubic are {shapes}; they must be [n], [n, 4], [n], [n]")
    if any(array.dtype.kind not in "iu" for array in (sizes, which, boxes, mirror, cubic)):
        raise ValueError("sizes, which, boxes, mirror and cubic must be integers")
    if min(size) < 1:
        raise ValueError(f"size is {size}; it must be >= 1")
    if n and not (which.min() >= 0 and which.max() < len(sizes)):
        raise ValueError(f"which is in [{which.min()}, {which.max()}] and there are {len(sizes)} images")
    corner, extent = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    wrong = ((corner < 0) | (extent < 1) | (corner + extent > sizes[which])).any(axis=1)
    if wrong.any():
        k = int(wrong.argmax())
        raise ValueError(
            f"box {k} (top, left, height, width) is {boxes[k].tolist()} in an image of {sizes[which[k]].tolist()}"
        )
