"""A real browser, for pages: what it says of one at a width, and what it shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; apt-get install chromium")
TIMEOUT = 120.0  # seconds for what takes two

# In an <iframe> a page is laid out as in a window of its size, which a window of a headless browser cannot be: it is
# never less than 500 pixels wide.
_FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>body {{ margin: 0 }}</style>
<iframe src="{page}" style="width: {width}px; height: {height}px; border: 0; display: block"></iframe><pre></pre>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const box = element => element.getBoundingClientRect(), style = getComputedStyle;
  const texts = [...page.querySelectorAll("svg text")].filter(text => style(text).visibility == "visible");
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth,
    content: root.scrollWidth,
    paper: style(page.body).backgroundColor,
    images: page.images.length,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    charts: page.querySelectorAll("svg.plot").length,
    columns: new Set([...page.querySelectorAll(".chart")].map(chart => box(chart).left)).size,
    lines: [...page.querySelectorAll(".plot > path.line")].filter(path => path.getTotalLength() > 0).length,
    bars: [...page.querySelectorAll("rect.bar")].filter(bar => box(bar).height > 0).length,
    outside: texts.filter(text => {{
      const own = box(text), whole = box(text.ownerSVGElement);
      return own.left < whole.left || own.right > whole.right || own.top < whole.top || own.bottom > whole.bottom;
    }}).map(text => text.textContent),
  }});
}});
</script>
"""


class Seen(NamedTuple):
    """What a browser makes of a page: figures that it measures, and what it complains of."""

    figures: dict[str, Any]
    complaints: list[str]


def look(page: Path, folder: Path, *, width: int, dark: bool) -> Seen:
    """Lay a page out at this width (pixels), in a folder for what that takes."""
    frame = folder / "frame.html"
    frame.write_text(_FRAME.format(page=page.as_uri(), width=width, height=2000))
    flags = ["--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom", "--enable-logging=stderr"]
    done = _run(*flags, *_scheme(dark), frame.as_uri(), folder=folder)
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), complaints)


def screenshot(page: Path, out: Path, *, width: int, height: int, dark: bool) -> None:
    """A PNG of the page's upper end, at this width (at least 500 pixels) and height."""
    flags = [f"--window-size={width},{height}", f"--screenshot={out}"]
    _run(*flags, *_scheme(dark), page.as_uri(), folder=out.parent)


def _scheme(dark: bool) -> list[str]:
    return [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]


def _run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    quiet = ("quic", "background-networking", "component-update", "sync", "gpu")
    flags = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
    ]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", *words]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
