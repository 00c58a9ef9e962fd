"""A sheet of labelled samples as the trainer will see them: from the training loader, its augmentation included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.checks.findings import imagenet_wnids
from vimfast.config import AugmentConfig
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import open_source
from vimfast.data.views import Evaluation, training_view
from vimfast.files import atomic_write

_ROWS, _COLUMNS = 4, 8
_CELL, _GAP, _CAPTION, _MARGIN = 192, 16, 46, 28  # pixels
_PAPER, _INK, _FAINT = (243, 243, 245), (32, 32, 36), (120, 120, 128)


def draw_sample_grid(path: Path, split: str, out: Path, *, size: int, seed: int) -> None:
    """Draw 32 images of a split, each with its class below it, and write them as PNG.

    They are the first of a run's epoch 0 (without repeated augmentation): with the default crops, RandAugment and
    erasing for ``"train"``, evaluation's centre crops for ``"val"``.

    Args:
        path: shards or a folder tree.
        size: the trainer's ``--input-size``, pixels.
        seed: the trainer's ``--seed``.

    Raises:
        UserError: the loader cannot read the data, or `out` cannot be written.
    """
    source = open_source(path, split)
    order = Order(len(source), min(len(source), _ROWS * _COLUMNS), seed=seed)
    cpu = torch.device("cpu")
    view = training_view(order, cpu, AugmentConfig(), size=size) if split == "train" else Evaluation(order, cpu, size)
    loader = Loader(source, view, LoaderSettings(prefetch=1))
    try:
        images, labels = next(loader.epoch(0))
    finally:
        loader.close()
    captions = class_captions(source.classes)
    sheet = _draw(to_pixels(images), [captions[label] for label in labels.tolist()])
    with atomic_write(out) as file:
        sheet.save(file, "PNG")


def to_pixels(images: Tensor) -> np.ndarray:
    """Undo the normalization: [B, 3, S, S] float -> uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    values = (images.float() * std + mean) * 255
    return values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def class_captions(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Two lines per class: for ImageNet an English name and the wnid, otherwise just the class name."""
    wnids = imagenet_wnids(classes)
    if not wnids:
        return [(name, "") for name in classes]
    from timm.data.imagenet_info import ImageNetInfo

    describe = ImageNetInfo().label_name_to_description
    return [(describe(name).split(",")[0], name) if name in wnids else (name, "") for name in classes]


def _draw(images: np.ndarray, captions: list[tuple[str, str]]) -> Image.Image:
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    caption = _CAPTION if any(second for _, second in captions) else _CAPTION - 16
    step = _CELL + _GAP
    width = 2 * _MARGIN + columns * step - _GAP
    height = 2 * _MARGIN + rows * (step + caption) - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    big, small = ImageFont.load_default(17), ImageFont.load_default(13)
    for i, (pixels, (first, second)) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = _MARGIN + column * step, _MARGIN + row * (step + caption)
        tile = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
        sheet.paste(tile, (left, top))
        middle, below = left + _CELL // 2, top + _CELL + 7
        draw.text((middle, below), _shorten(first, big), _INK, big, anchor="ma")
        draw.text((middle, below + 21), _shorten(second, small), _FAINT, small, anchor="ma")
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut so that it is no wider than an image."""
    if font.getlength(text) <= _CELL:
        return text
    while text and font.getlength(text + "…") > _CELL:
        text = text[:-1]
    return text.rstrip() + "…"
