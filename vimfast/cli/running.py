"""How a program runs and how what ends it becomes an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from vimfast.cli.reporting import report_once
from vimfast.errors import UserError


def run_main(main: Callable[[], int | None], end: Callable[[int], NoReturn] = sys.exit) -> None:
    """Run an entry point: a ``UserError`` becomes one line on stderr and exit status 2, Ctrl-C one and 130.

    Anything else is a bug and keeps its traceback.
    """
    try:
        status = main() or 0
    except UserError as error:
        report_once(f"error: {error}")
        status = 2
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        status = 130
    end(status)
