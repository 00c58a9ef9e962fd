"""``vimfast doctor``: is this machine fit to train on, and what to do where it is not.

    vimfast doctor shards/

Exit status 0: it is, perhaps not at full speed. 1: something that vimfast needs does not work. (2: a misspelled flag.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from vimfast import __version__
from vimfast.cli import LiveLine, Parser, fit_terminal, path
from vimfast.cli.styles import ADVICE, BAD, DOUBTFUL, GOOD
from vimfast.doctor import Line, State, examine

_MARKS: Mapping[State, str] = {"green": "✓", "yellow": "!", "red": "✗"}
_STYLES: Mapping[State, str] = {"green": GOOD, "yellow": DOUBTFUL, "red": BAD}
_USUAL = "half a minute"  # 12 to 20 s on two cores
_PLAIN_MARKS: Mapping[State, str] = {"green": "+", "yellow": "!", "red": "x"}


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast doctor",
        "Look at the software, the GPUs, the machine and the data, and run Vim-Tiny on each backend. Green: fine; "
        "yellow: works, but slower or with less than it could; red: does not work. Exit status 1 if anything is red.",
        epilog="example: vimfast doctor shards/",
    )
    parser.add_argument("data", metavar="DATA", nargs="?", type=path, help="data whose speed is measured")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with all figures, instead of a table")
    return parser


def main() -> int:
    """Look at everything; returns the exit status."""
    args = parser().parse_args(sys.argv[1:])
    if sys.stderr.isatty():
        begin = f"looking at this machine, which takes about {_USUAL}, or minutes where it is busy or something hangs"
        print(fit_terminal(begin, sys.stderr), file=sys.stderr)
    with LiveLine() as live:
        lines = examine(args.data, lambda what, number, of: live.say(f"{number}/{of} {what}"))
    if args.json:
        print(json.dumps(to_json(lines), indent=1))
    else:
        _print(lines)
    return int(any(line.state == "red" for line in lines))


def to_json(lines: Sequence[Line]) -> dict[str, Any]:
    """The lines in plain values."""
    states = [line.state for line in lines]
    counts = {"green": states.count("green"), "yellow": states.count("yellow"), "red": states.count("red")}
    return {"vimfast": __version__, **counts, "lines": [asdict(line) for line in lines]}


def _marks() -> Mapping[State, str]:
    try:
        "".join(_MARKS.values()).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return _PLAIN_MARKS
    return _MARKS


def _print(lines: Sequence[Line]) -> None:
    marks = _marks()
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # it may be what is broken
        for line in lines:
            print(f"{marks[line.state]} {line.what}: {line.found}{line.fix and f' -> {line.fix}'}")
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True, max_width=24)
    table.add_column(overflow="fold")
    for part, of in groupby(lines, lambda line: line.part):
        table.add_row("", Text(part, "bold"), "")
        for line in of:
            found = Text(line.found)
            if line.fix:
                found.append(f"\n-> {line.fix}", ADVICE)
            table.add_row(Text(marks[line.state], _STYLES[line.state]), Text(line.what), found)
        table.add_section()
    console = Console(highlight=False)
    console.print(table)
    red, yellow = (sum(line.state == state for line in lines) for state in ("red", "yellow"))
    verdict = "fit to train on" if not red else "not fit to train on"
    console.print(Text(f"{verdict}: {red} red, {yellow} yellow", BAD if red else ADVICE))
