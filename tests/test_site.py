"""The documentation site is built without a warning, and its pages need no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FETCHED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. --strict makes errors of links to nowhere, and of pages that the navigation lacks."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """Collects what a browser fetches with a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (address := values.get(FETCHED.get(tag, ""))) and values.get("rel") != "canonical":
            self.fetched.append(address)
        if tag == "a" and (address := values.get("href")):
            self.links.append(address)


def test_pages_fetch_nothing_from_elsewhere_and_link_to_files_of_the_site(site: Path) -> None:
    pages = sorted(set(site.rglob("*.html")) - {site / "404.html"})  # whose links are of the root of a server
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # README and CONTRIBUTING are pages, too
    for path in pages:
        page = Page(path.read_text())
        assert page.fetched or "runs" in path.parts  # the report of a run is one file
        for address in [*page.fetched, *(link for link in page.links if not re.match(r"[a-z]+:", link))]:
            target = address.partition("#")[0].partition("?")[0]
            assert not target or (path.parent / target).exists(), f"{path.relative_to(site)}: {address}"


def test_style_sheets_fetch_nothing_from_elsewhere(site: Path) -> None:
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_a_link_out_of_docs_leads_to_the_page_in_the_site(site: Path) -> None:
    """As docs/releasing.md has one to ../CHANGELOG.md, and README.md has one to docs/kernels.md."""
    assert "CHANGELOG.html" in Page((site / "releasing.html").read_text()).links
    front = Page((site / "index.html").read_text())
    assert "kernels.html" in front.links
    assert not [link for link in front.links if "docs/" in link]
