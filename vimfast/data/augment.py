"""What is drawn for a picture, in plain numpy: crop boxes, flips, and the geometry of evaluation.

Every draw is a pure function of (seed, epoch, position in the epoch's global sequence). DALI's graph holds no random
operator, so a resumed run repeats the pictures of an uninterrupted one, whatever the number of ranks.
"""

from __future__ import annotations

import numpy as np

# One row of uniform numbers a picture, handed out by column. A column keeps its meaning for good: moving one would
# change the pictures of every run that is resumed. Columns 24 to 63 are free.
COLUMNS = 64
CROP_TRIES = 10
CROP_AREA = slice(0, CROP_TRIES)
CROP_ASPECT = slice(CROP_TRIES, 2 * CROP_TRIES)
CROP_TOP = 20
CROP_LEFT = 21
FLIP = 22
CROP_FILTER = 23

_DRAWS_PER_COUNT = 4  # Philox yields four 64-bit numbers for each value of its counter


def uniforms(
    seed: int,
    epoch: int,
    positions: np.ndarray,  # int64 [n]
    columns: int = COLUMNS,
    stream: int = 0,
) -> np.ndarray:  # float64 [n, columns] in [0, 1)
    """Uniform random numbers, a row for each position; a row depends on (seed, epoch, its position) alone.

    Philox is a function of (key, counter): the key holds seed and epoch, and row g owns the counters from
    g * columns / 4 on (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Another `stream` has
    other numbers, so its columns and their number are its own.
    """
    counts = -(-columns // _DRAWS_PER_COUNT)
    bits = np.random.Philox(key=np.array([seed, epoch + (stream << 32)], dtype=np.uint64))
    generator = np.random.Generator(bits)
    if len(positions) and (np.diff(positions) == 1).all():  # neighbours, as one rank alone sees: all at once
        bits.advance(int(positions[0]) * counts)
        return generator.random((len(positions), counts * _DRAWS_PER_COUNT))[:, :columns]
    rows = np.empty((len(positions), columns))
    counter = 0
    for row, position in zip(rows, positions.tolist(), strict=True):
        bits.advance((position * counts - counter) % 2**256)
        generator.random(out=row)
        counter = (position + 1) * counts
    return rows


def random_resized_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:  # int32 [n, 4]: top, left, height, width
    """Boxes of a random part of the area and a random aspect ratio, as torchvision's ``RandomResizedCrop`` draws them.

    The area is uniform in `scale` times the picture's, the aspect ratio (width / height) log-uniform in `ratio`. The
    first of ten tries that fits wins, at a uniform place; when none fits, the largest centred box with an aspect
    ratio within `ratio`.
    """
    height, width = sizes[:, :1].astype(np.int64), sizes[:, 1:].astype(np.int64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, CROP_AREA])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * u[:, CROP_ASPECT])
    tried_width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tried_height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (tried_width > 0) & (tried_width <= width) & (tried_height > 0) & (tried_height <= height)
    first = fits.argmax(axis=1)[:, None]
    box_height = np.take_along_axis(tried_height, first, axis=1)[:, 0]
    box_width = np.take_along_axis(tried_width, first, axis=1)[:, 0]
    top = np.floor(u[:, CROP_TOP] * (height[:, 0] - box_height + 1)).astype(np.int64)
    left = np.floor(u[:, CROP_LEFT] * (width[:, 0] - box_width + 1)).astype(np.int64)
    drawn = np.stack([top, left, box_height, box_width], axis=1)
    return np.where(fits.any(axis=1)[:, None], drawn, _centre_box(sizes, ratio)).astype(np.int32)


def _centre_box(sizes: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:  # int64 [n, 4]
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    aspect = width / height
    box_height = np.where(aspect < ratio[0], np.rint(width / ratio[0]).astype(np.int64), height)
    box_width = np.where(aspect > ratio[1], np.rint(height * ratio[1]).astype(np.int64), width)
    return np.stack([(height - box_height) // 2, (width - box_width) // 2, box_height, box_width], axis=1)


def padded_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: int,
    padding: int = 4,
) -> np.ndarray:  # int32 [n, 2]: top, left; may be negative
    """Corners of a `size` x `size` box at a uniform place in the picture with `padding` pixels more on each side.

    As torchvision's ``RandomCrop`` draws them. Where even the padded picture is smaller, the box is centred on it.
    """
    places = sizes.astype(np.int64) + 2 * padding - size + 1
    drawn = np.floor(u[:, [CROP_TOP, CROP_LEFT]] * np.maximum(places, 1))
    return np.where(places > 0, drawn - padding, (sizes.astype(np.int64) - size) // 2).astype(np.int32)


def simple_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: int,
    padding: int = 4,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The short side resized to `size`, then :func:`padded_crop` where the padding mirrors the picture.

    Returns:
        resized: int32 [n, 2], height and width once resized.
        corner: int32 [n, 2], top and left of the box moved into the resized picture.
        shift: int32 [n, 2], how far the box drawn lies down and right of there. What it shows is inside the moved box.
    """
    resized = short_side(sizes, size)
    drawn = padded_crop(u, resized, size, padding)
    corner = drawn.clip(0, resized - size)
    return resized, corner, drawn - corner


def flips(u: np.ndarray, probability: float = 0.5) -> np.ndarray:  # int32 [n]: 1 mirrors left and right
    """Whether each picture is mirrored."""
    return (u[:, FLIP] < probability).astype(np.int32)


def filters(u: np.ndarray, interpolation: str) -> np.ndarray:  # int32 [n]: 1 bicubic, 0 bilinear
    """The resampling filter of each picture; where it is ``"random"``, either with the same probability."""
    drawn = (u[:, CROP_FILTER] >= 0.5).astype(np.int32)
    return drawn if interpolation == "random" else np.full_like(drawn, interpolation == "bicubic")


def resize_and_centre_crop(
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: int,
    crop_ratio: float = 0.875,
) -> tuple[np.ndarray, np.ndarray]:
    """The geometry of evaluation, with torchvision's roundings (``Resize`` then ``CenterCrop``).

    Returns:
        resized: int32 [n, 2], height and width once the short side is ``int(size / crop_ratio)``.
        corner: int32 [n, 2], top and left of the centred `size` x `size` box in the resized picture.
    """
    resized = short_side(sizes, int(size / crop_ratio))
    return resized, np.rint((resized - size) / 2).astype(np.int32)


def short_side(sizes: np.ndarray, target: int) -> np.ndarray:  # int32 [n, 2]: height, width
    """Sizes once the short side is `target`, with the rounding of torchvision's ``Resize``."""
    sizes = sizes.astype(np.int64)
    short = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, target, (target * sizes / short).astype(np.int64)).astype(np.int32)
