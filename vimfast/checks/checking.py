"""Checks of a folder or of shards as a command line says, and the report of them on a terminal."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vimfast.checks.findings import CheckOptions, Finding, Findings, Report
from vimfast.checks.folder import check_folder
from vimfast.checks.shards import check_shards
from vimfast.cli import refuse_unwritable, say_written, wrapped, writing
from vimfast.cli.styles import ADVICE, BAD, DOUBTFUL
from vimfast.errors import UserError, counted, in_bytes, one_line
from vimfast.shards.format import is_shards_folder

_LINES_PER_GROUP, _GROUPS = 5, 25  # findings on a screen; --json has all
_INDENT = 5  # columns of the further lines of one that a terminal is too narrow for


def check(path: Path, options: CheckOptions) -> Report:
    """Check all of a folder tree or a shards folder.

    Raises:
        UserError: there is nothing, or a worker process was killed.
        OSError: the folder cannot be read.
    """
    return check_shards(path, options) if is_shards_folder(path) else check_folder(path, options)


def run(args: argparse.Namespace) -> int:
    """Check, and print or write what was found; returns the exit status.

    Args:
        args: what ``vimfast.check_data`` has parsed.
    """
    refuse_unwritable("--sample-grid", args.sample_grid)
    refuse_unwritable("--html", args.html)
    options = CheckOptions(args.classes, tuple(args.splits), args.decode, args.workers)
    try:
        report = check(args.path, options)
    except UserError as error:
        report = Report(str(args.path), "nothing", findings=Findings([Finding.of(error, "", args.path)]))
    except OSError as error:
        fix = "fix its permissions, or the disk, and check again"
        finding = Finding("error", "", str(error.filename or args.path), f"cannot be read: {error.strerror}", fix)
        report = Report(str(args.path), "nothing", findings=Findings([finding]))
    written: list[Path] = []
    unwritten: UserError | None = None
    try:
        if args.sample_grid is not None and report.kind != "nothing" and _draw_samples(report, args):
            written.append(args.sample_grid)
        if args.html is not None:
            _write_page(report, args)
            written.append(args.html)
    except UserError as error:  # which says nothing of the data
        unwritten = error
    console = Console(highlight=False, soft_wrap=True)
    if args.json:
        print(json.dumps(to_json(report), indent=1))
    else:
        _print(report, console)
    for file in written:
        say_written(file, aside=args.json)
    if not args.json:
        _print_verdict(report, console)
    if unwritten is not None:
        raise unwritten
    return 0 if report.fit else 1


def _draw_samples(report: Report, args: argparse.Namespace) -> bool:
    """Draw the sheet, if it can be; data that the trainer's loader refuses is not fit."""
    from vimfast.checks.sample_grid import draw_sample_grid  # here, for it brings torch and DALI

    with writing("--sample-grid", args.sample_grid):
        try:
            draw_sample_grid(args.path, args.splits[0], args.sample_grid, size=args.input_size, seed=args.seed)
            return True
        except UserError as error:
            report.findings.append(Finding.of(error, args.splits[0], args.path))
    return False


def _write_page(report: Report, args: argparse.Namespace) -> None:
    from vimfast.checks.page import write_page

    with writing("--html", args.html):
        write_page(report, args.html, args.input_size)


def to_json(report: Report) -> dict[str, Any]:
    """The report in plain values, with all findings that were kept."""
    return {
        "path": report.path,
        "kind": report.kind,
        "fit": report.fit,
        "errors": report.findings.errors,
        "warnings": report.findings.warnings,
        "not_listed": report.findings.dropped,
        "splits": [split._asdict() for split in report.splits],
        "findings": [asdict(finding) for finding in report.findings],
    }


def _print(report: Report, console: Console) -> None:
    def say(text: str, style: str = "") -> None:
        text = text.encode("utf-8", "backslashreplace").decode()
        console.print(Text(wrapped(text, console.width, _INDENT) if console.is_terminal else text, style))

    if report.splits:
        say(f"{report.path} ({report.kind})")  # a title would be broken at the table's width
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("split")
        for title in ("classes", "images", "fewest per class", "most per class", "image bytes"):
            table.add_column(title, justify="right")
        for name, *numbers, size in report.splits:
            table.add_row(name, *(f"{number:,}" for number in numbers), in_bytes(size))
        console.print(table)
    groups = report.findings.by_kind()
    for kind, findings in groups[:_GROUPS]:
        severity, split, fix = kind
        say(f"{severity}{split and f' in {split}'}", BAD if severity == "error" else DOUBTFUL)
        for finding in findings[:_LINES_PER_GROUP]:
            say(one_line(f"  {finding.file}: {finding.what}"))
        if (total := report.findings.of_kind(kind)) > _LINES_PER_GROUP:
            say(f"  and {total - _LINES_PER_GROUP:,} more; --json lists {'all' if total == len(findings) else 'some'}")
        say(f"  -> {fix}\n" if fix else "", ADVICE)
    if len(groups) > _GROUPS:
        say(f"and {len(groups) - _GROUPS:,} more kinds of findings; --json lists all\n")


def _print_verdict(report: Report, console: Console) -> None:
    counts = f"{counted(report.findings.errors, 'error')}, {counted(report.findings.warnings, 'warning')}"
    verdict = f"{'fit to train on' if report.fit else 'not fit to train on'}: {counts}"
    console.print(Text(verdict, ADVICE if report.fit else BAD))
