"""The one exception for what a user can mend, and how every entry point tells it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input, told in one sentence that holds the value and the cure."""


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A tail for an error sentence: ``"; did you mean 'lr'?"``, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
