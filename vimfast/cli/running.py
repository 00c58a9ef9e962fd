"""How a program runs and how what ends it becomes an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from vimfast.cli.reporting import discard_output, is_output_read, output_error, report_once
from vimfast.errors import UserError, unusable_package


def run_main(main: Callable[[], int | None], end: Callable[[int], NoReturn] = sys.exit) -> None:
    """Run an entry point: a ``UserError``, a package that is missing or broken, or a stdout that is full, becomes one
    line on stderr and exit status 2, Ctrl-C one and 130; a reader of stdout that has read enough, such as ``head``, is
    no error: 141 and no line.

    Anything else is a bug and keeps its traceback.
    """
    _open_closed_streams()
    try:
        status = _status(main)
        print(end="", flush=True)  # while a reader that is gone can be told from a bug
    except UserError as error:
        report_once(f"error: {error}")
        status = 2
    except BrokenPipeError:
        if is_output_read():
            raise
        discard_output()
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        status = 130
    except Exception as error:
        known = unusable_package(error) or output_error(error)
        if known is None:
            raise
        report_once(f"error: {known}")
        status = 2
    end(status)


def _status(main: Callable[[], int | None]) -> int:
    """What it returns; where it exits, as after ``--help``, only once its output is written."""
    try:
        return main() or 0
    except SystemExit:
        print(end="", flush=True)
        raise


def _open_closed_streams() -> None:
    """Have stdin, stdout and stderr that are closed, as by ``>&-``, be empty or be read by nobody.

    Python has None for them, and the next file to be opened, a shard perhaps, would have the number of one: what a
    library prints would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
