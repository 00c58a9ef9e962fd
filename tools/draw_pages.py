"""docs/loader.svg and docs/kernels.svg, the drawings of how the loader and the kernels work.

python tools/draw_pages.py                           # draw them again after a change of this file
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from drawing import Drawing

DOCS = Path(__file__).parent.parent / "docs"
GREY, BLUE, YELLOW, GREEN, PINK = (  # (fill, line), as in docs/architecture.yaml
    ("#ececec", "#7a7a7a"),
    ("#e3eefb", "#3b6ea8"),
    ("#fdf0d8", "#b07a1e"),
    ("#e2f3e8", "#2a7f62"),
    ("#f4e4f1", "#96437f"),
)
CROPS = ("#c0392b", "#2864b4", "#2a7f62")  # the three copies of an image


class Box(NamedTuple):
    """In pixels of the image, whose upper left corner is 0, 0."""

    x: int
    y: int
    width: int
    height: int


IMAGE = Box(0, 0, 176, 128)
BOXES = (Box(46, 14, 84, 66), Box(30, 44, 58, 62), Box(78, 36, 74, 74))
REGION = Box(30, 14, 122, 96)  # what they cover together


def _page(height: int) -> Drawing:
    drawing = Drawing()
    drawing.box(0, 0, 1000, height, "white", "none", radius=0)
    return drawing


def _crop(drawing: Drawing, x: float, y: float, colour: str, side: int = 44) -> None:
    drawing.box(x, y, side, side, colour + "22", colour, radius=2, stroke_width="2")


def draw_loader(out: Path) -> None:
    """Above, an image with three crops on its way; below, who works on which step at the same time."""
    drawing = _page(560)
    stages = [
        (20, 200, BLUE, "1  Draw", ["numpy, no pixels yet: three", "boxes, flips, augmentations"]),
        (244, 200, YELLOW, "2  Decode once", ["DALI: only what the boxes", "cover together"]),
        (468, 132, GREEN, "3  Cut", ["three crops,", "resized, mirrored"]),
        (624, 148, PINK, "4  Exchange", ["each crop to the GPU", "that trains on it"]),
        (796, 184, GREEN, "5  Augment", ["RandAugment, normalize,", "erase, as drawn in 1"]),
    ]
    for x, width, (fill, line), title, text in stages:
        drawing.box(x, 16, width, 262, fill, line, radius=10)
        drawing.text(x + 12, 42, "title", title)
        for i, words in enumerate(text):
            drawing.text(x + 12, 62 + 17 * i, "note", words)
    for (x, width, *_), (following, *_) in pairwise(stages):
        drawing.arrow([(x + width + 2, 178), (following - 2, 178)])

    left, top = 32, 114
    drawing.box(left, top, IMAGE.width, IMAGE.height, *GREY, radius=2)
    drawing.box(left + REGION.x, top + REGION.y, REGION.width, REGION.height, "none", "#333", 0, stroke_dasharray="5 4")
    for box, colour in zip(BOXES, CROPS, strict=True):
        drawing.box(left + box.x, top + box.y, box.width, box.height, colour + "22", colour, 0, stroke_width="2")
    drawing.text(left, top + IMAGE.height + 20, "note", "its size is in the index")

    left = 256
    drawing.box(left, top, IMAGE.width, IMAGE.height, "none", "#aaa", radius=2, stroke_dasharray="2 4")
    drawing.box(left + REGION.x, top + REGION.y, REGION.width, REGION.height, GREY[0], "#333", radius=0)
    drawing.text(left, top + IMAGE.height + 20, "note", "the rest is never decoded")

    for i, colour in enumerate(CROPS):
        y = 114 + 54 * i
        _crop(drawing, 512, y, colour)
        drawing.box(640, y, 116, 44, "white", PINK[1])
        drawing.text(652, y + 27, "text", f"GPU {i}")
        _crop(drawing, 716, y + 6, colour, side=32)
        _crop(drawing, 866, y, colour)
        drawing.box(866 + 10 * i + 4, y + 8, 14, 14, "#555", "none", radius=0)

    drawing.text(20, 318, "lane", "All of it at the same time, for different steps")
    rows = [
        ("Read-ahead thread", "reads and draws", BLUE, [(0, 4, "steps 18 to 21"), (4, 4, "steps 22 to 25")]),
        (
            "DALI's threads",
            "decode several steps at once",
            YELLOW,
            [(0, 4, "steps 10 to 13"), (4, 4, "steps 14 to 17")],
        ),
        ("Loader's stream", "cuts, exchanges, augments", GREEN, [(i, 1, f"{8 + i}") for i in range(8)]),
        ("Current stream", "trains", GREEN, [(i, 1, f"step {7 + i}" if i == 0 else f"{7 + i}") for i in range(8)]),
    ]
    for i, (who, what, (fill, line), steps) in enumerate(rows):
        y = 336 + 46 * i
        drawing.text(20, y + 16, "title", who)
        drawing.text(20, y + 33, "note", what)
        for begin, length, words in steps:
            width = 92 * length - 6
            drawing.box(246 + 92 * begin, y, width, 36, fill, line)
            drawing.text(246 + 92 * begin + width / 2, y + 23, "text", words, "middle")
    drawing.arrow([(246, 532), (980, 532)])
    drawing.text(238, 536, "note", "time", "end")
    drawing.save(out, 1000, 560)


def draw_kernels(out: Path) -> None:
    """Above, a block and its kernels; below, the scan of 64 channels of an image by two warps."""
    drawing = _page(530)
    drawing.text(20, 34, "lane", "A block of Vision Mamba: three products and three launches")
    parts = [
        (130, YELLOW, "add, norm", "norm"),
        (110, GREY, "in_proj", "product"),
        (166, YELLOW, "convolution, SiLU", "conv, both directions"),
        (110, GREY, "x_proj", "product"),
        (232, YELLOW, "dt_proj, scan, gate, sum", "scan, both directions"),
        (110, GREY, "out_proj", "product"),
    ]
    gap = (960 - sum(width for width, *_ in parts)) / (len(parts) - 1)
    x, top, middles = 20.0, 84, []
    for i, (width, (fill, line), title, note) in enumerate(parts):
        drawing.box(x, top, width, 54, fill, line)
        drawing.text(x + width / 2, top + 23, "title", title, "middle")
        drawing.text(x + width / 2, top + 42, "note", note, "middle")
        middles.append(x + width / 2)
        if i + 1 < len(parts):
            drawing.arrow([(x + width, top + 27), (x + width + gap - 1, top + 27)])
        x += width + gap
    drawing.arrow([(middles[1], top), (middles[1], 62), (middles[4], 62), (middles[4], top - 1)])
    drawing.text((middles[1] + middles[4]) / 2, 56, "note", "z, the gate", "middle")
    for x, (fill, line), words in (
        (20, YELLOW, "a kernel of vimfast, one launch"),
        (268, GREY, "matrix product, by cuBLAS"),
    ):
        drawing.box(x, 156, 26, 16, fill, line, radius=4)
        drawing.text(x + 34, 169, "note", words)
    drawing.text(478, 169, "note", "the first launch also packs the weights; backward recomputes what is cheap")

    drawing.text(20, 222, "lane", "The scan: both directions at once, meeting in the middle")
    drawing.text(
        20, 242, "note", "A program is 64 channels of one image. Each direction has a warp; a thread has 2 channels"
    )
    drawing.text(
        20, 259, "note", "x 16 states in registers. Steps come in chunks of 8, whose B and C are in shared memory."
    )
    left, half = 150, 400
    rows = [
        (286, BLUE, "warp 0", "first to last", 0),
        (372, PINK, "warp 1", "last to first", 1),
    ]
    for y, (fill, line), who, what, late in rows:
        drawing.text(20, y + 26, "title", who)
        drawing.text(20, y + 43, "note", what)
        for part in (0, 1):
            x = left + half * part
            first = part == late
            drawing.box(x, y, half - 4, 58, fill if first else "white", line)
            texts = (
                ("comes first: leaves its y", "in global memory")
                if first
                else ("comes second: adds", "the y that it finds there, gates, writes")
            )
            for i, words in enumerate(texts):
                drawing.text(x + half / 2, y + 25 + 18 * i, "text", words, "middle")
    drawing.arrow([(left, 352), (left + 2 * half, 352)])
    drawing.arrow([(left + 2 * half - 4, 438), (left, 438)])
    drawing.box(left + half - 2.5, 276, 1, 186, "#333", "none", radius=0)
    drawing.text(left, 466, "note", "token 0")
    drawing.text(left + half - 2, 480, "note", "both warps get here at the same time", "middle")
    drawing.text(left + 2 * half - 4, 466, "note", "token 196", "end")
    drawing.text(
        20,
        512,
        "note",
        "So the sum over both directions needs neither atomics nor another pass, and is the same from run to run.",
    )
    drawing.save(out, 1000, 530)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to [%(default)s]")
    out = parser.parse_args().out
    draw_loader(out / "loader.svg")
    draw_kernels(out / "kernels.svg")


if __name__ == "__main__":
    main()
