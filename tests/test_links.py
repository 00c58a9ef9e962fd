"""Links between the pages of this repository lead to files and headings that exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?)(?: \"[^\"]*\")?\)")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


def links(page: Path, text: str) -> Iterator[tuple[str, Path, str]]:
    """Those inside the repository, each with the file it leads to, and the fragment."""
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):  # http, https, mailto
            continue
        name, _, fragment = link.partition("#")
        yield link, (page.parent / name).resolve() if name else page, fragment


def broken(page: Path, text: str) -> Iterator[str]:
    for link, target, fragment in links(page, text):
        inside = target == ROOT or ROOT in target.parents
        if not inside or not target.exists() or (fragment and fragment not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page, prose(page))) == []


def test_no_link_leads_to_a_file_that_git_ignores() -> None:
    """It is there for its author alone."""
    targets = sorted({str(target.relative_to(ROOT)) for page in PAGES for _, target, _ in links(page, prose(page))})
    command = ["git", "check-ignore", "--stdin"]  # what is tracked is not ignored
    done = subprocess.run(command, cwd=ROOT, input="\n".join(targets), capture_output=True, text=True, check=False)
    if done.returncode == 128:
        pytest.skip("not a clone")
    assert done.stdout == ""


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs" / "flags.md"
    fine = (
        "[a](kernels.md) [b](../CHANGELOG.md#unreleased) [c](#model) [d](https://example.org/x#y) ![e](bench_train.png)"
    )
    assert list(broken(page, fine)) == []
    wrong = "[a](nowhere.md) [b](kernels.md#nowhere) [c](#nowhere) [d](../../outside.md)"
    assert list(broken(page, wrong)) == ["nowhere.md", "kernels.md#nowhere", "#nowhere", "../../outside.md"]
