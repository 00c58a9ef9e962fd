"""Where the square that a model sees is cut out of an image; a rectangle, if its input is not square.

A crop is a class with one method. A :class:`BoxCrop` cuts a box, which is then resized to the square; a
:class:`SquareCrop` resizes the image and cuts the square out of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from vimfast.augment.draws import CROP_AREA, CROP_ASPECT, CROP_LEFT, CROP_TOP
from vimfast.errors import UserError
from vimfast.image_size import ImageSize, SizeLike


class Boxes(NamedTuple):
    """Boxes inside images, to be resized to the square."""

    corner: np.ndarray  # int32 [n, 2]: top, left
    extent: np.ndarray  # int32 [n, 2]: height, width


class Squares(NamedTuple):
    """Squares of resized images; black where they lie outside."""

    resized: np.ndarray  # int32 [n, 2]: height, width
    corner: np.ndarray  # int32 [n, 2]: top, left; may be outside
    shift: np.ndarray | None = (
        None  # int32 [n, 2]: down, right, by which the square is then moved, mirroring its border
    )


@runtime_checkable
class BoxCrop(Protocol):
    """Cuts a box out of an image. What is decoded is the box alone, or what the boxes of several copies cover."""

    def boxes(self, u: np.ndarray, sizes: np.ndarray) -> Boxes:
        """Boxes for images of these sizes (int [n, 2]: height, width), drawn with `u` (float64 [n, COLUMNS])."""


@runtime_checkable
class SquareCrop(Protocol):
    """Resizes a whole image, then cuts the square out of it."""

    def squares(self, u: np.ndarray, sizes: np.ndarray, size: ImageSize) -> Squares:
        """Squares of this height and width, otherwise as :meth:`BoxCrop.boxes`."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of a random part of the area and a random aspect ratio, as torchvision's class of that name draws it.

    Args:
        scale, ratio: of the box's area (share of the image) and aspect (width over height).

    Raises:
        UserError: they are out of order or out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        (small, large), (low, high) = self.scale, self.ratio
        if not (0 < small <= large <= 1 and 0 < low <= high):
            raise UserError(
                f"the crop's scale is {self.scale} and its ratio {self.ratio}; each must be MIN <= MAX, above 0, and "
                "the scale at most 1"
            )

    def boxes(self, u: np.ndarray, sizes: np.ndarray) -> Boxes:
        drawn = random_resized_crop(u, sizes, self.scale, self.ratio)
        return Boxes(np.ascontiguousarray(drawn[:, :2]), np.ascontiguousarray(drawn[:, 2:]))


@dataclass(frozen=True)
class PaddedCrop:
    """The image as it is, padded with black; the square is anywhere in it (:func:`padded_crop`).

    Args:
        of: the size of which `padding` and the images are, where squares of another size show the same of them: the
            images are then resized in proportion; None: they never are.
    """

    padding: int = 4
    of: ImageSize | None = None

    def squares(self, u: np.ndarray, sizes: np.ndarray, size: SizeLike) -> Squares:
        if self.of is None:
            return Squares(sizes.astype(np.int32), padded_crop(u, sizes, size, self.padding))
        factor = np.array(ImageSize.of(size)) / self.of
        resized = np.rint(sizes * factor).clip(1).astype(np.int32)
        return Squares(resized, padded_crop(u, resized, size, round(self.padding * factor.mean())))


@dataclass(frozen=True)
class ShortSideCrop:
    """Resized to cover the square and no more, padded by mirroring (:func:`simple_crop`)."""

    padding: int = 4

    def squares(self, u: np.ndarray, sizes: np.ndarray, size: SizeLike) -> Squares:
        return Squares(*simple_crop(u, sizes, size, self.padding))


@dataclass(frozen=True)
class CentreCrop:
    """Resized to cover ``int(size / ratio)`` either way, and the square in the middle, as evaluation has it.

    Raises:
        UserError: the ratio is not in (0, 1].
    """

    ratio: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"the evaluation's crop ratio is {self.ratio}; it must be above 0 and at most 1")

    def squares(self, u: np.ndarray, sizes: np.ndarray, size: SizeLike) -> Squares:
        return Squares(*resize_and_centre_crop(sizes, size, self.ratio))


def random_resized_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:  # int32 [n, 4]: top, left, height, width
    """Boxes of a random part of the area and a random aspect ratio, as torchvision's ``RandomResizedCrop`` draws them.

    The area is uniform in `scale` times the image's, the aspect ratio (width / height) log-uniform in `ratio`. The
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
    # Of an image of a pixel or two, such a box may be nothing: torchvision's is empty there.
    box_height = np.where(aspect < ratio[0], np.rint(width / ratio[0]).clip(1).astype(np.int64), height)
    box_width = np.where(aspect > ratio[1], np.rint(height * ratio[1]).clip(1).astype(np.int64), width)
    return np.stack([(height - box_height) // 2, (width - box_width) // 2, box_height, box_width], axis=1)


def padded_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: SizeLike,
    padding: int = 4,
) -> np.ndarray:  # int32 [n, 2]: top, left; may be negative
    """Corners of a box of `size` pixels at a uniform place in the image with `padding` pixels more on each side.

    As torchvision's ``RandomCrop`` draws them. Where even the padded image is smaller, the box is centred on it.
    """
    size = ImageSize.of(size)
    places = sizes.astype(np.int64) + 2 * padding - size + 1
    drawn = np.floor(u[:, [CROP_TOP, CROP_LEFT]] * np.maximum(places, 1))
    return np.where(places > 0, drawn - padding, (sizes.astype(np.int64) - size) // 2).astype(np.int32)


def simple_crop(
    u: np.ndarray,  # float64 [n, COLUMNS]
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: SizeLike,
    padding: int = 4,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resized to cover `size`, then :func:`padded_crop` where the padding mirrors the image.

    Returns:
        resized: int32 [n, 2], height and width once resized.
        corner: int32 [n, 2], top and left of the box moved into the resized image.
        shift: int32 [n, 2], how far the box drawn lies down and right of there. What it shows is inside the moved box.
    """
    size = ImageSize.of(size)
    resized = covering(sizes, size)
    drawn = padded_crop(u, resized, size, padding)
    corner = drawn.clip(0, resized - np.array(size, np.int32))
    return resized, corner, drawn - corner


def resize_and_centre_crop(
    sizes: np.ndarray,  # int [n, 2]: height, width
    size: SizeLike,
    crop_ratio: float = 0.875,
) -> tuple[np.ndarray, np.ndarray]:
    """The geometry of evaluation, with torchvision's roundings (``Resize`` then ``CenterCrop``).

    Returns:
        resized: int32 [n, 2], height and width once the image covers ``int(size / crop_ratio)`` either way.
        corner: int32 [n, 2], top and left of the centred box of `size` pixels in the resized image.
    """
    size = ImageSize.of(size)
    resized = covering(sizes, ImageSize(*(int(side / crop_ratio) for side in size)))
    return resized, np.rint((resized - size) / 2).astype(np.int32)


def covering(sizes: np.ndarray, target: ImageSize) -> np.ndarray:  # int32 [n, 2]: height, width
    """Sizes of images once they are just as large as to cover `target`, in their own aspect ratio.

    For a square the short side is its side, with the rounding of torchvision's ``Resize``; for other targets sides are
    rounded as by timm's ``ResizeKeepRatio``.
    """
    sizes = sizes.astype(np.int64)
    if target.height != target.width:
        ratio = (sizes / target).min(axis=1, keepdims=True)
        covered: np.ndarray = np.rint(sizes / ratio).astype(np.int32)
        return covered
    side, short = target.height, sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, side, (side * sizes / short).astype(np.int64)).astype(np.int32)
