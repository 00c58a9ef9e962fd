"""A plan carried out by Pillow, image by image: not fast but exact, and what the GPU kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vimfast.augment.colours import fill_colour
from vimfast.augment.plan import Op, Plan


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


def carry_out(images: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """:func:`vimfast.augment.pixels.carry_out` on the CPU."""
    fill = fill_colour(mean)
    changed = images.numpy().copy()
    for i in np.flatnonzero(plan.operations["code"].any(axis=1)).tolist():
        changed[i] = change(changed[i], plan.operations[i], fill)
    centre, spread = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) * 255 for values in (mean, std))
    channels_first = torch.from_numpy(changed).permute(0, 3, 1, 2)
    result = channels_first.to(torch.float32, memory_format=torch.contiguous_format).sub_(centre).div_(spread)
    for image, patches in zip(result, plan.patches, strict=True):
        for patch in patches[patches["bottom"] > patches["top"]]:
            box = image[:, patch["top"] : patch["bottom"], patch["left"] : patch["right"]]
            if patch["seed"] < 0:
                box.copy_(torch.from_numpy(patch["fill"].copy()).view(3, 1, 1))
            else:
                noise = np.random.Generator(np.random.Philox(key=int(patch["seed"])))
                box.copy_(torch.from_numpy(noise.standard_normal(box.shape, np.float32)))
    return result.to(dtype)
