"""Flags with helpful errors."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vimfast.errors import UserError, did_you_mean
from vimfast.image_size import ImageSize, SizeLike


class _OneSpelling(argparse.HelpFormatter):
    """Lists each flag by the first of its spellings, and by ``-h``; breaks no line inside a flag, and keeps those of an
    epilog with several examples."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(f"{indent}{line}\n" for line in text.splitlines()).rstrip()
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        flag = action.option_strings[0]
        if action.nargs == 0:
            return flag if action.metavar is None else f"{flag} {action.metavar}"
        return f"{flag} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; its errors are a ``UserError``, with the nearest flag for a misspelled one.

    Args:
        prog: how the program is called, if not as a subcommand of ``vimfast``.

    Attributes:
        elsewhere: what to suggest for flags that other programs have, by their names with hyphens.
        path_flag: the flag that a path without one was probably meant for, if there is one.
    """

    elsewhere: Mapping[str, str] = {}
    path_flag = ""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        called = sys.argv[0] if sys.argv[0].startswith("vimfast ") else prog
        options = {"formatter_class": _OneSpelling, **options}
        super().__init__(called, description=description, allow_abbrev=False, **options)
        self.register("type", int, whole())
        self.register("type", float, number)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        known = [flag for action in self._actions for flag in action.option_strings]
        args = self._with_sizes_joined(args)
        for word in args:  # before argparse, which may complain of a missing flag instead
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                meant = self.elsewhere.get(flag.replace("_", "-").removeprefix("--"))
                shown = [name for name in known if "_" not in name]  # as --help spells them
                hint = did_you_mean(flag.replace("_", "-"), shown) if meant is None else f"; did you mean {meant!r}?"
                raise UserError(f"unknown flag {flag}{hint}", "--help lists all flags")
        if self.path_flag:
            _, stray = super().parse_known_args(args)
            if stray and (os.sep in stray[0] or os.path.exists(stray[0])):
                raise UserError(f"{stray[0]!r} follows no flag", f"give the data with {self.path_flag} {stray[0]}")
        parsed: argparse.Namespace = super().parse_args(args, namespace)
        return parsed

    def _with_sizes_joined(self, args: Sequence[str]) -> list[str]:
        """Height and width as one word: argparse would take whatever follows one number for the other."""
        flags = [flag for action in self._actions if action.type is image_size for flag in action.option_strings]
        joined: list[str] = []
        for word in args:
            if word.isdecimal() and len(joined) > 1 and joined[-2] in flags and joined[-1].isdecimal():
                joined[-1] += f"x{word}"
            else:
                joined.append(word)
        return joined

    def error(self, message: str) -> NoReturn:
        """argparse's complaint, with the first spelling of a flag that has several; what `unfit` made says all."""
        message = re.sub(r"^argument (-[\w-]+)(/-[\w-]+)*: ", r"\1: ", message)
        flag, separator, complaint = message.partition(f": {_UNFIT}")
        if separator:
            raise UserError(f"{flag.removeprefix('argument ')} is {complaint}")
        raise UserError(message, f"see {self.prog} --help")


_UNFIT = "the value is "  # until the parser puts the flag in its place


def unfit(value: object, wanted: str) -> argparse.ArgumentTypeError:
    """What an argparse type raises, for ``--flag is VALUE; it must be WANTED``, as `vimfast.config` words it too."""
    return argparse.ArgumentTypeError(f"{_UNFIT}{value!r}; it must be {wanted}")


def path(text: str) -> Path:
    """An argparse type: a path, where ``~`` is the home folder also after ``--flag=``, which no shell expands."""
    if "://" in text:
        raise unfit(text, "a path on this machine")
    return Path(os.path.expanduser(text))


def png(text: str) -> Path:
    """An argparse type: a file to write an image to, of the one kind that is written."""
    if not text.lower().endswith(".png"):
        raise unfit(text, "a name that ends in .png, the kind of file that is written")
    return path(text)


def path_or_url(text: str) -> str:
    """An argparse type: the same, or the URL of a folder in a store, as text."""
    return os.path.expanduser(text)


SIZE = "N|HEIGHT WIDTH"  # how help shows a value of `image_size`


def image_size(text: str) -> SizeLike:
    """An argparse type: the side of a square, or height and width (two words, which the parser joins), in pixels."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise unfit(text, "an integer >= 1, or two, for height and width")
    height, width = int(sides[0]), int(sides[-1])
    if min(height, width) < 1:
        raise unfit(min(height, width), ">= 1")
    return ImageSize(height, width).plain


def number(text: str) -> float:
    """An argparse type: any number; :class:`Parser` takes it wherever the type is float."""
    try:
        return float(text)
    except ValueError:
        raise unfit(text, "a number") from None


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in this range; :class:`Parser` takes one without limits wherever the type is int."""
    limits = "" if least is None else f">= {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise unfit(text, f"an integer {limits}".rstrip()) from None
        if (least is not None and value < least) or (most is not None and value > most):
            raise unfit(value, limits)
        return value

    return parse
