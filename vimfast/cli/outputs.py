"""The files that a command line names to be written: where they cannot be, that is said before anything takes time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vimfast.errors import UserError, remedy
from vimfast.files import try_to_write


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """What a block writes is the file of a flag.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        fix = remedy(error, f"give {flag} a file in another folder, which must exist")
        raise UserError(f"{flag} {path} cannot be written ({error.strerror or error})", fix) from None


def refuse_unwritable(flag: str, path: Path | None) -> None:
    """Look whether the file of a flag, if it was given, can be written.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        return
    if not path.parent.exists():
        raise UserError(f"{flag} {path} is in a folder that does not exist", "give a file in one that does")
    with writing(flag, path):
        try_to_write(path)
