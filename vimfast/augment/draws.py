"""Uniform random numbers that are a function of (seed, epoch, position), and what is drawn with one of them.

DALI's graphs hold no random operator, so a resumed run repeats the images of an uninterrupted one, whatever the number
of ranks.
"""

from __future__ import annotations

import numpy as np

# One row of uniform numbers per image, handed out by column. A column keeps its meaning for good: moving one would
# change the images of every run that is resumed. Columns 24 to 63 are free.
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
    """Uniform random numbers, one row per position; a row depends on (seed, epoch, its position) alone.

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


def flips(u: np.ndarray, probability: float = 0.5) -> np.ndarray:  # int32 [n]: 1 mirrors left and right
    """Whether each image is mirrored."""
    return (u[:, FLIP] < probability).astype(np.int32)


def filters(u: np.ndarray, interpolation: str) -> np.ndarray:  # int32 [n]: 1 bicubic, 0 bilinear
    """The resampling filter of each image; where it is ``"random"``, both are equally likely."""
    drawn = (u[:, CROP_FILTER] >= 0.5).astype(np.int32)
    return drawn if interpolation == "random" else np.full_like(drawn, interpolation == "bicubic")
