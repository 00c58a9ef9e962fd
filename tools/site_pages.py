"""A hook of MkDocs (mkdocs.yml): pages that lie outside docs/ become part of the site, and links lead to them there.

README.md is the site's first page. Links are written as GitHub needs them, from file to file; here each one is made
relative to where its target lies in the site, and what a page links to outside docs/ comes along: pages as pages,
anything else as the file it is. A link to a folder is one to its README.md.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FRONT = "README.md"
_CODE = r"(?ms)^ *(?P<fence>```|~~~).*?^ *(?P=fence)|`[^`\n]*`"
_LINK = r"(?P<open>\]\()(?P<target>[^()\s#]+)(?P<rest>[^()\s]*\))"
_TEXT = re.compile(f"{_CODE}|{_LINK}")
_CELL = re.compile(r"`([^`\n]*\\\|[^`\n]*)`")  # code with a bar, in a table


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what those pages link to, and so on."""
    waiting = [FRONT, *(f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md"))]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if files.get_file_from_path(_place(name)) is None:
            files.append(File.generated(config, _place(name), abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            text = (ROOT / name).read_text()
            waiting += [found for match in _TEXT.finditer(text) if (found := _target(name, match)) is not None]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point a page's links at places in the site; what leads nowhere is left for MkDocs to complain of."""
    place = page.file.src_uri
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def point(match: re.Match[str]) -> str:
        target = _target(path, match)
        if target is None:
            return match[0]
        link = os.path.relpath(_place(target), PurePosixPath(place).parent)
        return f"{match['open']}{link}{match['rest']}"

    return _CELL.sub(_bars, _TEXT.sub(point, markdown))


def _bars(match: re.Match[str]) -> str:
    """Code in a table with an escaped bar, whose backslash Python-Markdown would show."""
    code = html.escape(match[1]).replace(r"\|", "&#124;")
    return f"<code>{code}</code>"


def _place(name: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if name == FRONT else name.removeprefix("docs/")


def _target(page: str, match: re.Match[str]) -> str | None:
    """The file of the repository that a link on `page` leads to; None for code and for addresses."""
    if match["target"] is None or re.match(r"[a-z]+:", match["target"]):
        return None
    path = (ROOT / page).parent / match["target"]
    if path.is_dir():
        path = path / "README.md"
    path = Path(os.path.normpath(path))
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None
