"""``vimfast report``: write ``report.html`` of a run folder again.

A run does it after each epoch; this is for pages that were lost, or are of an earlier vimfast.
"""

from __future__ import annotations

import sys

from vimfast.cli import Parser, path, say_written
from vimfast.errors import UserError, remedy


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast report",
        "Write report.html of a run folder again, from log.txt, config.yaml and report.json. Training does it after "
        "each epoch.",
        epilog="example: vimfast report runs/tiny",
    )
    parser.add_argument("run", metavar="RUN", type=path, help="the --output_dir of a run")
    return parser


def main() -> None:
    """Write the page that the command line asks for."""
    folder = parser().parse_args(sys.argv[1:]).run
    from vimfast.run_report import write_page

    try:
        written = write_page(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror})", remedy(error) or "check its disk"
        ) from None
    say_written(written)
