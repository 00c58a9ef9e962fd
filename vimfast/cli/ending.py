"""Ways to end a process when the ordinary one may hang."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import sys
from contextlib import suppress
from typing import NoReturn, TextIO

_nowhere: TextIO | None = None  # what a backstop writes to


def end_process(status: int) -> NoReturn:
    """Exit with `status`, skipping the interpreter's own shutdown: libraries that hold the device have hung in it."""
    atexit._run_exitfuncs()
    exit_now(status)


def exit_now(status: int) -> NoReturn:
    """Exit with `status` at once."""
    backstop(2.0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def backstop(seconds: float) -> None:
    """End the process with status 1 after `seconds`, whatever holds the interpreter lock."""
    global _nowhere
    with suppress(OSError):
        _nowhere = open(os.devnull, "w")  # noqa: SIM115  # held open until the end
        faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere)


def end_with_parent() -> None:
    """Run in a thread of a worker process, so that a killed program leaves no workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
