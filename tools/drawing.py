"""SVG drawings of the docs: rectangles, lines and text, in one style."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as xml

TITLE, TEXT, FILE = 15, 13, 12  # sizes of type
STYLE = f"""
text {{ font-family: "DejaVu Sans", Verdana, sans-serif; fill: #222; }}
.lane {{ font-size: 16px; font-weight: bold; }}
.note {{ font-size: 12px; fill: #555; }}
.title {{ font-size: {TITLE}px; font-weight: bold; }}
.text {{ font-size: {TEXT}px; }}
.file {{ font-size: {FILE}px; font-family: "DejaVu Sans Mono", Menlo, monospace; fill: #444; }}
"""


class Drawing:
    """An SVG of rectangles, lines and text; all coordinates in pixels."""

    def __init__(self) -> None:
        self.root = xml.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
        xml.SubElement(self.root, "style").text = STYLE
        marker = xml.SubElement(xml.SubElement(self.root, "defs"), "marker", id="tip", markerUnits="userSpaceOnUse")
        marker.attrib |= {"markerWidth": "12", "markerHeight": "12", "refX": "9", "refY": "5", "orient": "auto"}
        xml.SubElement(marker, "path", d="M 0 0 L 10 5 L 0 10 z", fill="#333")

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, line: str, radius: int = 6, **style: str
    ) -> None:
        """`style`: more attributes of the rectangle, such as stroke_width."""
        place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}", "rx": str(radius)}
        more = {name.replace("_", "-"): value for name, value in style.items()}
        xml.SubElement(self.root, "rect", place, fill=fill, stroke=line, **more)

    def text(self, x: float, y: float, kind: str, words: str, anchor: str = "start") -> None:
        place = {"x": f"{x:g}", "y": f"{y:g}", "class": kind, "text-anchor": anchor}
        xml.SubElement(self.root, "text", place).text = words

    def arrow(self, points: list[tuple[float, float]], dashed: bool = False) -> None:
        path = "M " + " L ".join(f"{x:g} {y:g}" for x, y in points)
        style = {"fill": "none", "stroke": "#333", "stroke-width": "1.6", "marker-end": "url(#tip)"}
        xml.SubElement(self.root, "path", {"d": path, **style, **({"stroke-dasharray": "6 4"} if dashed else {})})

    def save(self, out: Path, width: float, height: float) -> None:
        self.root.attrib |= {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
        xml.indent(self.root)
        out.write_text(xml.tostring(self.root, encoding="unicode") + "\n")
