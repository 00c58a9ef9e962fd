"""Height and width of the images that a model sees.

Settings, files and timm write the side of a square as one number, and any other size as height and width. Whatever
computes with a size takes an :class:`ImageSize`.
"""

from __future__ import annotations

from typing import NamedTuple

SizeLike = int | tuple[int, int]  # the side of a square, or height and width; pixels


class ImageSize(NamedTuple):
    """In pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, size: SizeLike) -> ImageSize:
        return cls(size, size) if isinstance(size, int) else cls(*size)

    @property
    def plain(self) -> SizeLike:
        """One number for a square."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.height * self.width

    @property
    def words(self) -> str:
        """As flags take it: ``224``, or ``192 256``."""
        return " ".join(map(str, dict.fromkeys(self)))

    def __str__(self) -> str:
        """``224``, or ``192 x 256`` for a height of 192."""
        return self.words.replace(" ", " x ")
