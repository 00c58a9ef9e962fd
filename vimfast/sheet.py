"""Images on a sheet, with captions, headings and a legend, drawn by Pillow alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from vimfast.errors import printable

Colour: TypeAlias = "tuple[int, int, int]"
_Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

PALETTE: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))  # Okabe and Ito's

_PAPER, _PANEL, _INK, _FAINT, _RULE = (243, 243, 245), (255, 255, 255), (32, 32, 36), (112, 112, 120), (222, 222, 227)
_MARGIN, _GAP, _INSET, _BETWEEN = 32, 16, 12, 10  # around all, between panels, inside a panel, between its images
_TITLE, _TEXT, _SMALL = 25, 15, 13  # sizes of letters
_LINE, _BAR = 20, 5
_FRAME = 3
# Where Pillow's own font, of little more than English, lacks a letter. Named as the systems' packages name them.
_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),
)
_NO_GLYPH = "\uffff"


class Caption(NamedTuple):
    """A line below an image."""

    text: str
    right: str = ""  # what stands at its right end
    share: float | None = None  # of a bar below it; None: no bar
    faint: bool = False


@dataclass(frozen=True)
class Tile:
    """An image, shrunk or enlarged to fit, and what is written below it."""

    image: Image.Image
    captions: Sequence[Caption] = ()
    frame: Colour | None = None


@dataclass(frozen=True)
class Sheet:
    """What is on it.

    Attributes:
        title: above all; cut where it is too long.
        subtitle: paragraphs below it.
        panels: images that belong together, as many in each.
        across: panels beside each other.
        headings: above the images of a panel, one each; equal ones beside each other are written once.
        legend: paragraphs below all.
        side: of an image, pixels.
    """

    title: str
    subtitle: Sequence[str]
    panels: Sequence[Sequence[Tile]]
    across: int
    headings: Sequence[str] = ()
    legend: Sequence[str] = ()
    side: int = 160

    def draw(self) -> Image.Image:
        across = min(self.across, len(self.panels))
        wide = len(self.panels[0])
        panel_width = 2 * _INSET + wide * (self.side + _BETWEEN) - _BETWEEN
        width = 2 * _MARGIN + max(across * (panel_width + _GAP) - _GAP, _LEAST_WIDTH)
        rows = [self.panels[i : i + across] for i in range(0, len(self.panels), across)]
        heights = [self._panel_height(row) for row in rows]
        subtitle = _wrap(self.subtitle, _TEXT, width - 2 * _MARGIN)
        legend = _wrap(self.legend, _SMALL, width - 2 * _MARGIN)
        top = _MARGIN + _TITLE + 12 + _LINE * len(subtitle) + _GAP
        headings = _LINE + 4 if self.headings else 0
        bottom = top + headings + sum(heights) + _GAP * len(heights)
        height = bottom + _LINE * len(legend) + _MARGIN - (0 if legend else _GAP)
        sheet = Image.new("RGB", (width, height), _PAPER)
        pen = ImageDraw.Draw(sheet)
        _write(pen, (_MARGIN, _MARGIN - 6), _shorten(self.title, _TITLE, width - 2 * _MARGIN), _TITLE, _INK)
        for i, line in enumerate(subtitle):
            _write(pen, (_MARGIN, _MARGIN + _TITLE + 8 + i * _LINE), line, _TEXT, _FAINT)
        for column in range(across):
            self._draw_headings(pen, _MARGIN + column * (panel_width + _GAP) + _INSET, top)
        y = top + headings
        for row, tall in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                x = _MARGIN + column * (panel_width + _GAP)
                pen.rounded_rectangle((x, y, x + panel_width, y + tall), 8, _PANEL, _RULE)
                for i, tile in enumerate(panel):
                    self._draw_tile(sheet, pen, (x + _INSET + i * (self.side + _BETWEEN), y + _INSET), tile)
            y += tall + _GAP
        for i, line in enumerate(legend):
            _write(pen, (_MARGIN, bottom + i * _LINE), line, _SMALL, _FAINT)
        return sheet

    def _panel_height(self, row: Sequence[Sequence[Tile]]) -> int:
        captions = max(sum(map(_height, tile.captions)) for panel in row for tile in panel)
        return 2 * _INSET + self.side + (captions + 6 if captions else 0)

    def _draw_headings(self, pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for heading, same in groupby(range(len(self.headings)), self.headings.__getitem__):
            places = list(same)
            left = x + places[0] * (self.side + _BETWEEN)
            space = len(places) * (self.side + _BETWEEN) - _BETWEEN
            _write(pen, (left + space // 2, y), _shorten(heading, _TEXT, space), _TEXT, _INK, "ma")

    def _draw_tile(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], tile: Tile) -> None:
        x, y = at
        image = fit(tile.image, self.side)
        corner = x + (self.side - image.width) // 2, y + (self.side - image.height) // 2
        sheet.paste(image, corner)
        if tile.frame is not None:
            box = (corner[0], corner[1], corner[0] + image.width - 1, corner[1] + image.height - 1)
            pen.rectangle(box, outline=tile.frame, width=_FRAME)
        y += self.side + 6
        for caption in tile.captions:
            size, ink = (_SMALL, _FAINT) if caption.faint else (_TEXT, _INK)
            space = self.side
            if caption.right:
                _write(pen, (x + self.side, y), caption.right, size, ink, "ra")
                space -= round(_font(caption.right, size).getlength(caption.right)) + 8
            _write(pen, (x, y), _shorten(caption.text, size, space), size, ink)
            if caption.share is not None:
                bar = y + _LINE
                pen.rounded_rectangle((x, bar, x + self.side - 1, bar + _BAR - 1), 2, _RULE)
                if (filled := round(caption.share * self.side)) > 1:
                    pen.rounded_rectangle((x, bar, x + filled - 1, bar + _BAR - 1), 2, PALETTE[0])
            y += _height(caption)


_LEAST_WIDTH = 640  # so that a title has room above few images


def fit(image: Image.Image, side: int) -> Image.Image:
    """As large as a square of this side allows; a small one is enlarged so that its pixels show."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _height(caption: Caption) -> int:
    return _LINE + (0 if caption.share is None else _BAR + 5)


# Text


@functools.cache
def _default(size: int) -> _Font:
    return ImageFont.load_default(size)


@functools.cache
def _system(name: str, size: int) -> _Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@functools.lru_cache(4096)
def _font(text: str, size: int) -> _Font:
    """One that has all letters of a text, or else Pillow's own."""
    own = _default(size)
    for font in (own, *(_system(name, size) for name in _FONTS)):
        if font is not None and all(_has(font, letter) for letter in set(text)):
            return font
    return own


def _has(font: _Font, letter: str) -> bool:
    if letter.isspace():
        return True
    drawn, missing = font.getmask(letter), font.getmask(_NO_GLYPH)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: Colour, anchor: str = "la"
) -> None:
    pen.text(at, text, ink, _font(text, size), anchor=anchor)


def _shorten(text: str, size: int, space: float) -> str:
    """The text, cut so that it fits."""
    text = printable(text)
    width: Callable[[str], float] = _font(text, size).getlength
    if width(text) <= space:
        return text
    while text and width(text + "…") > space:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(paragraphs: Sequence[str], size: int, space: float) -> list[str]:
    """The text in lines that fit, broken between words."""
    lines: list[str] = []
    for text in paragraphs:
        lines.append("")
        for word in printable(text).split():
            longer = f"{lines[-1]} {word}".lstrip()
            if lines[-1] and _font(longer, size).getlength(longer) > space:
                lines.append(word)
            else:
                lines[-1] = longer
    return [_shorten(line, size, space) for line in lines]
