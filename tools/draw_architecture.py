"""docs/architecture.svg, the way of an image through threads and streams, drawn from docs/architecture.yaml.

python tools/draw_architecture.py                    # draw it again after a change of the YAML
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from drawing import Drawing

DOCS = Path(__file__).parent.parent / "docs"
GAP, MARGIN, PAD = 34, 16, 10  # between lanes, around all, inside a box; pixels
HEAD, ROW_GAP = 62, 26
LINE = 17  # pixels from one line of a box to the next


def draw(source: Path, out: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(source.read_text())
    kinds, arrows = content["kinds"], content["arrows"]
    drawing = Drawing()
    drawing.box(0, 0, 10_000, 10_000, "white", "none", radius=0)

    left, x = {}, float(MARGIN)
    widths = {lane["id"]: lane["width"] for lane in content["lanes"]}
    for lane in content["lanes"]:
        left[lane["id"]] = x
        x += lane["width"] + GAP
    right = x - GAP + MARGIN

    heights = {box["id"]: LINE * (1 + len(box["text"]) + len(box["file"])) + PAD for box in content["boxes"]}
    top, y = {}, MARGIN + HEAD + 14.0
    for row in range(1, 1 + max(box["row"] for box in content["boxes"])):
        top[row] = y
        y += max(heights[box["id"]] for box in content["boxes"] if box["row"] == row) + ROW_GAP
    bottom = y - ROW_GAP + 14

    for lane in content["lanes"]:
        at, width = left[lane["id"]], lane["width"]
        drawing.box(at - 12, MARGIN, width + 24, bottom - MARGIN, "#fafafa", "#d0d0d0", radius=10)
        drawing.text(at + width / 2, MARGIN + 26, "lane", lane["title"], "middle")
        drawing.text(at + width / 2, MARGIN + 46, "note", lane["note"], "middle")

    places = {}
    for box in content["boxes"]:
        at, y, kind = left[box["lane"]], top[box["row"]], kinds[box["kind"]]
        places[box["id"]] = at, y, widths[box["lane"]], heights[box["id"]]
        drawing.box(at, y, widths[box["lane"]], heights[box["id"]], kind["fill"], kind["line"])
        lines = [("title", box["title"]), *(("text", t) for t in box["text"]), *(("file", f) for f in box["file"])]
        for i, (style, words) in enumerate(lines):
            drawing.text(at + PAD, y + LINE * (i + 1) + 1, style, words)

    for start, end, kind, *label in content["links"]:
        (x0, y0, w0, h0), (x1, y1, w1, h1) = places[start], places[end]
        dashed = arrows[kind].get("dashed", False)
        if x0 == x1:  # straight down
            drawing.arrow([(x0 + w0 / 2, y0 + h0), (x1 + w1 / 2, y1)], dashed)
        elif y0 == y1:  # straight across
            level = y0 + min(h0, h1) / 2
            drawing.arrow([(x0 + w0, level), (x1, level)], dashed)
        else:  # down, then across
            level = y1 + h1 / 2
            drawing.arrow([(x0 + w0 / 2, y0 + h0), (x0 + w0 / 2, level), (x1, level)], dashed)
        for words in label:
            drawing.text(x0 + w0 / 2 - 8, y1 + h1 / 2 - 6, "note", words, "end")

    # The upper right is empty: images enter on the left.
    third, fourth = (content["lanes"][i]["id"] for i in (2, 3))
    x, y = left[third], top[1]
    entries = [*kinds.values(), *arrows.values()]
    width = left[fourth] + widths[fourth] - x
    drawing.box(x, y, width, 26 * len(entries) + 2 * PAD, "white", "#d0d0d0")
    for i, entry in enumerate(entries):
        level = y + PAD + 26 * i + 13
        if "fill" in entry:
            drawing.box(x + PAD, level - 8, 40, 16, entry["fill"], entry["line"], radius=4)
        else:
            drawing.arrow([(x + PAD, level), (x + PAD + 40, level)], entry.get("dashed", False))
        drawing.text(x + PAD + 54, level + 4, "text", entry["legend"])

    drawing.save(out, right, bottom + MARGIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=DOCS / "architecture.svg", help="file to write [%(default)s]")
    draw(DOCS / "architecture.yaml", parser.parse_args().out)


if __name__ == "__main__":
    main()
