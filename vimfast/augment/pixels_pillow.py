"""A plan carried out by Pillow, image by image: not fast but exact, and what the GPU kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vimfast.augment.colours import fill_colour
from vimfast.augment.plan import Op, Plan
from vimfast.augment.threads import ALONE, Threads


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    return image.point([(level >> (8 - bits)) << (8 - bits) for level in range(256)] * 3)


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, level + add) if level < 128 else level for level in range(256)] * 3)


def _shift(image: Image.Image, dx: int, dy: int) -> Image.Image:
    pixels = np.asarray(image)
    y, x = (_mirrored(np.arange(n) + by, n) for n, by in zip(pixels.shape[:2], (dy, dx), strict=True))
    return Image.fromarray(pixels[y[:, None], x])


def _mirrored(at: np.ndarray, n: int) -> np.ndarray:
    at = np.abs(at)
    mirrored: np.ndarray = np.minimum(at, 2 * (n - 1) - at)
    return mirrored


_CHANGES: dict[int, Callable[[Image.Image, np.ndarray], Image.Image]] = {
    Op.INVERT: lambda image, args: ImageOps.invert(image),
    Op.POSTERIZE: lambda image, args: _posterize(image, int(args[0])),
    Op.SOLARIZE: lambda image, args: ImageOps.solarize(image, int(args[0])),
    Op.SOLARIZE_ADD: lambda image, args: _solarize_add(image, int(args[0])),
    Op.BRIGHTNESS: lambda image, args: ImageEnhance.Brightness(image).enhance(args[0]),
    Op.CONTRAST: lambda image, args: ImageEnhance.Contrast(image).enhance(args[0]),
    Op.AUTOCONTRAST: lambda image, args: ImageOps.autocontrast(image),
    Op.EQUALIZE: lambda image, args: ImageOps.equalize(image),
    Op.COLOR: lambda image, args: ImageEnhance.Color(image).enhance(args[0]),
    Op.SHARPNESS: lambda image, args: ImageEnhance.Sharpness(image).enhance(args[0]),
    Op.BOX_X: lambda image, args: image.filter(ImageFilter.BoxBlur((args[0], 0))),
    Op.BOX_Y: lambda image, args: image.filter(ImageFilter.BoxBlur((0, args[0]))),
    Op.SHIFT: lambda image, args: _shift(image, int(args[0]), int(args[1])),
}


def change(pixels: np.ndarray, operations: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
    """One image, uint8 [H, W, 3], after its operations (OPERATION [S]); pixels from outside are `fill`."""
    image = Image.fromarray(pixels)
    for code, cubic, args in operations.tolist():
        if code == Op.AFFINE:
            resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
            image = image.transform(image.size, Image.Transform.AFFINE, args, resample, fillcolor=fill)
        elif code != Op.NONE:
            image = _CHANGES[code](image, args)
    return np.asarray(image)


def carry_out(
    images: Tensor,
    plan: Plan,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    threads: Threads = ALONE,
) -> Tensor:
    """:func:`vimfast.augment.pixels.carry_out` on the CPU."""
    batch, height, width, _ = images.shape
    # numpy asks for huge pages, torch does not: touching so much new memory page by page takes longer than filling it.
    out = np.empty((batch, 3, height, width), np.float32)
    pixels, fill = images.numpy(), fill_colour(mean)
    centre, spread = (255 * np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))

    def one(i: int) -> None:
        operations = plan.operations[i]
        image = change(pixels[i], operations, fill) if operations["code"].any() else pixels[i]
        np.copyto(out[i], image.transpose(2, 0, 1))
        np.subtract(out[i], centre, out=out[i])
        np.divide(out[i], spread, out=out[i])
        _erase(out[i], plan.patches[i])

    threads.each(one, batch)
    return torch.from_numpy(out).to(dtype)


def _erase(image: np.ndarray, patches: np.ndarray) -> None:
    for patch in patches[patches["bottom"] > patches["top"]]:
        box = image[:, patch["top"] : patch["bottom"], patch["left"] : patch["right"]]
        if patch["seed"] < 0:
            box[:] = patch["fill"].reshape(3, 1, 1)
        else:
            noise = np.random.Generator(np.random.Philox(key=int(patch["seed"])))
            box[:] = noise.standard_normal(box.shape, np.float32)
