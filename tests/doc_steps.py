"""The commands and the code on pages of the docs, and a way to run them as a reader would."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
    """Run Python, or the words of a ``vimfast`` command, in a folder; returns exit status and output.

    It runs in a fork of a process that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vimfast.train.build", "vimfast.inference", "vimfast.samples"])
    output = folder / ".output"
    process = context.Process(target=_run, args=(what, str(folder), str(output)))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    text = output.read_text()
    output.unlink()
    assert process.exitcode is not None
    return process.exitcode, text


def _run(what: str | list[str], folder: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    try:
        if isinstance(what, str):
            exec(compile(what, "<page>", "exec"), {"__name__": "__main__"})
        else:
            from vimfast.__main__ import main

            sys.argv = what
            main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
