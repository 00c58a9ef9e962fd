"""The one exception for what a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, told in one sentence that holds the value and the cure."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A tail for an error sentence: ``"; did you mean 'lr'?"``, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
