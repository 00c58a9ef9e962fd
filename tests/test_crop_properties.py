"""What holds for every crop: boxes and squares lie where they may, whatever the image's size and the draws."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vimfast.augment.crops import CentreCrop, PaddedCrop, RandomResizedCrop, ShortSideCrop
from vimfast.augment.draws import COLUMNS, CROP_AREA, CROP_ASPECT, CROP_TRIES
from vimfast.image_size import ImageSize

LARGEST_U = np.nextafter(1.0, 0.0)

sides = st.integers(1, 40) | st.integers(1, 5000)
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=8).map(lambda s: np.array(s, np.int64))
square = st.integers(1, 400)
input_sizes = (square | st.tuples(square, square)).map(ImageSize.of)


@st.composite
def ascending(draw: st.DrawFn, least: float, most: float) -> tuple[float, float]:
    low, high = sorted((draw(st.floats(least, most)), draw(st.floats(least, most))))
    return low, high


@st.composite
def uniform_rows(draw: st.DrawFn, rows: int) -> np.ndarray:
    """Uniform numbers [rows, COLUMNS], among them the smallest and the largest that there are."""
    u = np.random.default_rng(draw(st.integers(0, 2**32))).random((rows, COLUMNS))
    for edge in (0.0, LARGEST_U):
        u[np.random.default_rng(draw(st.integers(0, 2**32))).random(u.shape) < draw(st.sampled_from([0, 0.1]))] = edge
    return u


def tries(u: np.ndarray, height: int, width: int, crop: RandomResizedCrop) -> list[bool]:
    """Whether each of the ten boxes of one image fits into it."""
    fits = []
    for i in range(CROP_TRIES):
        area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * u[CROP_AREA][i])
        low, high = np.log(crop.ratio)
        aspect = np.exp(low + (high - low) * u[CROP_ASPECT][i])
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        fits.append(0 < w <= width and 0 < h <= height)
    return fits


@given(image_sizes, ascending(0.001, 1.0), ascending(0.05, 20.0), st.data())
def test_boxes_are_inside_with_an_area_and_an_aspect_within_bounds(
    sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], data: st.DataObject
) -> None:
    crop, u = RandomResizedCrop(scale, ratio), data.draw(uniform_rows(len(sizes)))
    corner, extent = crop.boxes(u, sizes)
    assert (corner >= 0).all()
    assert (extent >= 1).all()
    assert (corner + extent <= sizes).all()
    for row, (height, width), (top, left), (h, w) in zip(u, sizes, corner, extent, strict=True):
        if any(tries(row, height, width, crop)):  # bounds hold before sides are rounded to pixels
            area = height * width
            assert (h + 0.5) * (w + 0.5) >= scale[0] * area * (1 - 1e-9)
            assert (h - 0.5) * (w - 0.5) <= scale[1] * area * (1 + 1e-9)
            assert (w + 0.5) / (h - 0.5) >= ratio[0] * (1 - 1e-9)
            assert (w - 0.5) / (h + 0.5) <= ratio[1] * (1 + 1e-9)
        else:  # the largest box in the middle
            assert h == height or w == width
            assert abs(height - h - 2 * top) <= 1
            assert abs(width - w - 2 * left) <= 1


@given(image_sizes, input_sizes, st.integers(0, 8), st.data())
def test_padded_squares_are_inside_the_padded_image(
    sizes: np.ndarray, size: ImageSize, padding: int, data: st.DataObject
) -> None:
    resized, corner, shift = PaddedCrop(padding).squares(data.draw(uniform_rows(len(sizes))), sizes, size)
    assert shift is None
    np.testing.assert_array_equal(resized, sizes)
    room = sizes + 2 * padding - size
    inside = (corner >= -padding) & (corner + size <= sizes + padding)
    assert inside[room >= 0].all()
    assert (np.abs(2 * corner + size - sizes) <= 1)[room < 0].all()  # in the middle


def covers(resized: np.ndarray, sizes: np.ndarray, size: ImageSize) -> None:
    """Images of these sizes, resized, are as large as `size` one way and not smaller the other, in their own shape."""
    room = resized - size
    assert (room.min(axis=1) == 0).all()
    scale = (np.array(size) / sizes).max(axis=1, keepdims=True)
    assert (np.abs(resized - sizes * scale) <= 1 + 1e-6).all()


@given(image_sizes, input_sizes, st.integers(0, 8), st.data())
def test_short_side_squares_are_inside_the_resized_image(
    sizes: np.ndarray, size: ImageSize, padding: int, data: st.DataObject
) -> None:
    crop = ShortSideCrop(padding)
    resized, corner, shift = crop.squares(data.draw(uniform_rows(len(sizes))), sizes, size)
    assert shift is not None
    covers(resized, sizes, size)
    assert (corner >= 0).all()
    assert (corner + size <= resized).all()
    assert (np.abs(shift) <= padding).all()


@given(image_sizes, input_sizes, st.floats(0.05, 1.0))
def test_evaluation_squares_are_inside_and_in_the_middle(sizes: np.ndarray, size: ImageSize, ratio: float) -> None:
    resized, corner, shift = CentreCrop(ratio).squares(np.empty((len(sizes), COLUMNS)), sizes, size)
    assert shift is None
    covers(resized, sizes, ImageSize(*(int(side / ratio) for side in size)))
    assert (corner >= 0).all()
    assert (corner + size <= resized).all()
    assert (np.abs(2 * corner + size - resized) <= 1).all()
