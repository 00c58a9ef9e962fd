"""A plan carried out by Pillow, picture by picture: not fast but exact, and what the GPU kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vimfast.augment.colours import fill_colour
from vimfast.augment.plan import Op, Plan


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    return picture.point([(level >> (8 - bits)) << (8 - bits) for level in range(256)] * 3)


def _solarize_add(picture: Image.Image, add: int) -> Image.Image:
    return picture.point([min(255, level + add) if level < 128 else level for level in range(256)] * 3)


def _shift(picture: Image.Image, dx: int, dy: int) -> Image.Image:
    pixels = np.asarray(picture)
    y, x = (_mirrored(np.arange(n) + by, n) for n, by in zip(pixels.shape[:2], (dy, dx), strict=True))
    return Image.fromarray(pixels[y[:, None], x])


def _mirrored(at: np.ndarray, n: int) -> np.ndarray:
    at = np.abs(at)
    mirrored: np.ndarray = np.minimum(at, 2 * (n - 1) - at)
    return mirrored


_CHANGES: dict[int, Callable[[Image.Image, np.ndarray], Image.Image]] = {
    Op.INVERT: lambda picture, args: ImageOps.invert(picture),
    Op.POSTERIZE: lambda picture, args: _posterize(picture, int(args[0])),
    Op.SOLARIZE: lambda picture, args: ImageOps.solarize(picture, int(args[0])),
    Op.SOLARIZE_ADD: lambda picture, args: _solarize_add(picture, int(args[0])),
    Op.BRIGHTNESS: lambda picture, args: ImageEnhance.Brightness(picture).enhance(args[0]),
    Op.CONTRAST: lambda picture, args: ImageEnhance.Contrast(picture).enhance(args[0]),
    Op.AUTOCONTRAST: lambda picture, args: ImageOps.autocontrast(picture),
    Op.EQUALIZE: lambda picture, args: ImageOps.equalize(picture),
    Op.COLOR: lambda picture, args: ImageEnhance.Color(picture).enhance(args[0]),
    Op.SHARPNESS: lambda picture, args: ImageEnhance.Sharpness(picture).enhance(args[0]),
    Op.BOX_X: lambda picture, args: picture.filter(ImageFilter.BoxBlur((args[0], 0))),
    Op.BOX_Y: lambda picture, args: picture.filter(ImageFilter.BoxBlur((0, args[0]))),
    Op.SHIFT: lambda picture, args: _shift(picture, int(args[0]), int(args[1])),
}


def change(pixels: np.ndarray, operations: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
    """One picture, uint8 [H, W, 3], behind its operations (OPERATION [S]); pixels from outside are `fill`."""
    picture = Image.fromarray(pixels)
    for code, cubic, args in operations.tolist():
        if code == Op.AFFINE:
            resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
            picture = picture.transform(picture.size, Image.Transform.AFFINE, args, resample, fillcolor=fill)
        elif code != Op.NONE:
            picture = _CHANGES[code](picture, args)
    return np.asarray(picture)


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
