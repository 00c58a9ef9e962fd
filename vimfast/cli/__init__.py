"""What every command shares: its flags, how its errors are reported, and how it ends."""

from vimfast.cli.ending import backstop, end_process, end_with_parent, exit_now
from vimfast.cli.live import LiveLine
from vimfast.cli.outputs import refuse_unwritable, writing
from vimfast.cli.parser import SIZE, Parser, image_size, path, path_or_url, png, unfit, whole
from vimfast.cli.reporting import (
    first_on_host,
    fit_terminal,
    leave_word,
    print_out,
    report_once,
    say_written,
    was_reported,
    wrapped,
)
from vimfast.cli.running import run_main

__all__ = [
    "SIZE",
    "LiveLine",
    "Parser",
    "backstop",
    "end_process",
    "end_with_parent",
    "exit_now",
    "first_on_host",
    "fit_terminal",
    "image_size",
    "leave_word",
    "path",
    "path_or_url",
    "png",
    "print_out",
    "refuse_unwritable",
    "report_once",
    "run_main",
    "say_written",
    "unfit",
    "was_reported",
    "whole",
    "wrapped",
    "writing",
]
