"""What every entry point shares: flags that are told kindly when they are wrong, and how an error ends a program."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vimfast.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are a ``UserError``; a misspelt flag is told with the nearest."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in args:  # before argparse, which would rather miss the right flag than see the wrong one
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                raise UserError(f"unknown flag {flag}{did_you_mean(flag, known)}; --help lists all")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number of this range."""
    limits = f"{least} or more" if most is None else f"{least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number ({limits})") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value} is not {limits}")
        return value

    return parse


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point: a ``UserError`` becomes one line on stderr and exit status 2, Ctrl-C becomes 130.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def end_with_parent() -> None:
    """Run in a thread of a worker process: a killed program must not leave workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
