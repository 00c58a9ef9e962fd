"""``vimfast --completion bash``: a script that completes commands, flags and values in a shell, written by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import shtab

from vimfast.cli import Parser, path, path_or_url
from vimfast.config import recipes
from vimfast.config.flags import CONFIG

SHELLS = ("bash", "zsh", "fish")
_PATHS = {"PATH", "DATA", "FOLDER", "IMAGE", "PNG"}  # what stands for a file or a folder


def script(shell: str, commands: Iterable[tuple[str, str, Parser]]) -> str:
    """The script for one of :data:`SHELLS`.

    Args:
        commands: name, what it does, and the parser of each.
    """
    root = argparse.ArgumentParser("vimfast", description="ImageNet in, a trained Vision Mamba out.")
    root.add_argument("--version", action="store_true", help="say which version this is")
    root.add_argument("--completion", choices=SHELLS, help="print a script that completes in a shell")
    add: Any = root.add_subparsers(parser_class=argparse.ArgumentParser).add_parser
    for name, does, parser in commands:
        for action in parser._actions:
            _prepare(action)
        add(name, help=does, parents=[parser], add_help=False)
    return shtab.complete(root, shell)


def _prepare(action: Any) -> None:
    """One spelling of a flag, its choices, and files where it takes some."""
    if isinstance(action, argparse._StoreFalseAction):  # which --help shows beside the flag that it turns off
        action.help = f"turn --{action.dest.replace('_', '-')} off"
    if action.option_strings and "-h" not in action.option_strings:
        action.option_strings = action.option_strings[:1]
    words = [] if action.metavar is None or action.nargs == 0 else str(action.metavar).split("|")
    if action.dest == CONFIG:
        action.choices = list(recipes())
    elif action.type in (path, path_or_url, Path) or _PATHS & set(words):
        action.complete = shtab.FILE
    elif len(words) > 1:
        action.choices = [word for word in words if not word.isupper()]
