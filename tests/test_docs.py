"""What the docs say of the tree is true."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vimfast.shards.format import INDEX_DTYPE

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


MEASURED = ("benchmarks.md", "kernels.md", "reliability.md", "remote.md")
# Errors of other programs.
NOT_OURS = {
    "CUDA out of memory",
    "Cannot find backend for cpu",
    "RendezvousConnectionError",
    "address already in use",
    "EADDRINUSE",
}


def said() -> Iterator[str]:
    """Every text in the code, … where a value is put in."""
    for source in [*(ROOT / "vimfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_are_explained_in_the_words_that_are_printed() -> None:
    texts = list(said())
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = [
        error for heading in re.findall("^### (.*)", page, re.MULTILINE) for error in re.findall("`(.*?)`", heading)
    ]
    assert len(errors) > 20
    for error in set(errors) - NOT_OURS:
        words = re.compile(".*".join(map(re.escape, error.split("…"))), re.DOTALL)
        assert any(words.search(text) for text in texts), error


def test_the_index_has_the_columns_of_its_page() -> None:
    page = (ROOT / "docs" / "shards.md").read_text()
    columns = re.findall(r"^\| `(\w+)` \| `(<\w+)` \|", page, re.MULTILINE)
    assert columns == [(name, kind) for name, kind in INDEX_DTYPE.descr]


def test_figures_are_those_of_the_pages_that_have_their_commands() -> None:
    """A rate, a share or a size of memory that a page repeats was measured, and is found where it was."""
    measured = "".join(
        path.read_text()
        for path in [*(ROOT / "docs" / name for name in MEASURED), *(ROOT / "docs" / "lab").glob("*.md")]
    )
    repeated = [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name not in MEASURED)]
    for page in repeated:
        for figure in re.findall(r"([\d,.]*\d)(?: images/s| GiB| 张/秒)", page.read_text()):
            assert re.search(rf"(?<![\d,.]){re.escape(figure)}(?![\d,.]*\d)", measured), f"{page.name}: {figure}"
