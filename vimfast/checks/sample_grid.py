"""A sheet of samples as the trainer would see them with its default settings."""

from __future__ import annotations

from pathlib import Path

from vimfast.config import Config
from vimfast.files import atomic_write
from vimfast.image_size import SizeLike
from vimfast.samples import draw_samples

_IMAGES = 8


def draw_sample_grid(path: Path, split: str, out: Path, *, size: SizeLike, seed: int) -> None:
    """Draw images of a split, and write them as PNG; ``vimfast show`` does it for any settings.

    Args:
        path: shards or a folder tree.
        size: the trainer's ``--input-size``, pixels.
        seed: the trainer's ``--seed``.

    Raises:
        UserError: the loader cannot read the data.
        OSError: `out` cannot be written.
    """
    cfg = Config()
    cfg.data.data_path, cfg.model.input_size, cfg.run.seed, cfg.run.device = str(path), size, seed, "cpu"
    sheet = draw_samples(cfg, split, _IMAGES, "")
    with atomic_write(out) as file:
        sheet.save(file, "PNG")
