"""The commands and the code on pages of the docs, and a way to run them as a reader would."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from forked import run_forked, run_text

from vimfast.__main__ import main

ROOT = Path(__file__).parent.parent
_DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in _DOCS)]
PROGRAMS = ("vimfast", "vimfast-prepare", "make", "python", "torchrun", "pip", "srun")
CODE = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<block>.*?)^(?P=indent)```$|`(?P<span>[^`\n]+)`", re.MULTILINE | re.DOTALL
)


class Code(NamedTuple):
    """Python on a page."""

    page: str
    text: str


class Command(NamedTuple):
    """A command on a page, of two words or more. What is for the shell (`&`, `>`) is left out, and so is ``...``."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def steps(page: str) -> Iterator[Code | Command]:
    """What a page shows, in its order."""
    for code in CODE.finditer((ROOT / page).read_text()):
        if code["kind"] == "python":
            yield Code(page, code["block"])
        elif code["span"]:
            yield from _commands(page, code["span"])
        elif code["kind"] in ("", "bash"):
            for line in code["block"].replace("\\\n", " ").splitlines():
                yield from _commands(page, line)


def _commands(page: str, line: str) -> Iterator[Command]:
    for part in re.sub(r"(^|\s+)#.*", "", line).split("&&"):
        if part.split()[:1] and part.split()[0] in PROGRAMS:
            words = shlex.split(re.sub(r"&\s*$|>.*", "", part))
            if len(words) > 1:
                yield Command(page, tuple(word for word in words if word != "..."))


def blocks(page: str, kind: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code["block"] for code in CODE.finditer((ROOT / page).read_text()) if code["kind"] == kind]


def run(what: str | list[str], folder: Path) -> tuple[int, str]:
    """Run Python, or the words of a ``vimfast`` command, in a folder; returns exit status and output."""
    function, words = (run_text, [what]) if isinstance(what, str) else (_run_words, what)
    done = run_forked(function, *words, folder=folder, together=True)
    return done.returncode, done.stdout


def _run_words(*words: str) -> None:
    sys.argv = list(words)
    main()
