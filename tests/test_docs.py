"""What the docs say of the tree is true."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_drawing_is_that_of_its_source(tmp_path: Path) -> None:
    draw = runpy.run_path(str(ROOT / "tools" / "draw_architecture.py"))["draw"]
    draw(ROOT / "docs" / "architecture.yaml", tmp_path / "drawn.svg")
    drawn, kept = (tmp_path / "drawn.svg").read_text(), (ROOT / "docs" / "architecture.svg").read_text()
    assert drawn == kept, "run python tools/draw_architecture.py"


@pytest.mark.parametrize("name", ["loader", "kernels"])
def test_the_drawings_of_pages_are_those_of_their_source(name: str, tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "tools" / "draw_pages.py"))[f"draw_{name}"](tmp_path / "drawn.svg")
    drawn, kept = (tmp_path / "drawn.svg").read_text(), (ROOT / "docs" / f"{name}.svg").read_text()
    assert drawn == kept, "run python tools/draw_pages.py"


def test_files_in_the_drawing_exist() -> None:
    boxes = yaml.safe_load((ROOT / "docs" / "architecture.yaml").read_text())["boxes"]
    for name in {line.split()[0] for box in boxes for line in box["file"]}:
        path = ROOT / name if name.startswith("kernels/") else ROOT / "vimfast" / name
        assert path.exists() or not path.parent.exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
