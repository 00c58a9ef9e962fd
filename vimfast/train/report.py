"""What a run reports: lines, JSON records, TensorBoard, a live bar."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vimfast.cli import fit_terminal, wrapped
from vimfast.errors import UserError
from vimfast.run_report import TABLE, write_table
from vimfast.train.boards import Board, TensorBoard
from vimfast.train.records import RecordFile


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU as torch allocated it, or of this process on a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def watts(device: torch.device) -> float | None:
    """Power that the GPU draws; None where nothing measures it: on a CPU, or without nvidia-ml-py."""
    if device.type == "cuda":
        with suppress(Exception):  # of the driver, of a virtual GPU, of a package that is missing
            return torch.cuda.power_draw(device) / 1000
    return None


def _encodable(text: str) -> str:
    """Names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


_INDENT = 15  # columns before what a line of the plan says
_WIDE = 130  # columns of a terminal that shows all figures beside its bar
_NARROW = 90  # columns below which the figures take the bar's place
_PATIENCE = 0.5  # seconds for a bar to leave the terminal when the process ends at once


class _Outlasted:
    """A stream that may close before the run ends, such as a pipe to ``head`` or a terminal: it then swallows the rest.

    rich would end the program when its pipe closes, and a progress bar writes from a thread of its own.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _report_thread(other: Callable[[threading.ExceptHookArgs], object], error: threading.ExceptHookArgs) -> None:
    """Spare the user the traceback of TensorBoard's thread: what its disk says is raised again where it is used."""
    if not (type(error.thread).__module__.startswith("tensorboard") and isinstance(error.exc_value, OSError)):
        other(error)


class Reporter:
    """Reports for the main process, and is silent on the others.

    In `folder`, if one is given: every line in ``train.log``, one JSON object an epoch in ``log.txt``, and TensorBoard.
    On a terminal a live bar shows the place in the epoch; elsewhere the same figures come as plain lines.
    """

    def __init__(self, folder: Path | None, active: bool) -> None:
        self.active = active
        self.folder = folder if active else None
        stream: Any = _Outlasted(sys.stdout)
        self.console = Console(file=stream, quiet=not active, highlight=False, soft_wrap=True)
        self.live = active and self.console.is_terminal
        self._bar: tuple[Progress, Any] | None = None
        self._told: set[str] = set()  # files that could not be written, and of which it has been said
        self._boards: dict[str, Board] = {}  # by what a person calls their files
        self._records: RecordFile | None = None
        self._thread_hook: Callable[[threading.ExceptHookArgs], object] | None = None  # while there is a board
        if self.folder is not None:
            self._records = RecordFile(self.folder / "log.txt", self.warn)
            with self._beside("TensorBoard's file"):
                self.add("TensorBoard's file", TensorBoard(self.folder))
                self._thread_hook = threading.excepthook
                threading.excepthook = partial(_report_thread, self._thread_hook)

    def say(self, text: str, indent: int = 0) -> None:
        """A line; on a terminal, what does not fit comes below it, indented by so many columns."""
        text = _encodable(text)
        self.console.print(wrapped(text, self.console.width, indent) if self.live else text, markup=False)
        self._log(text)

    def row(self, what: str, how: str) -> None:
        """A line of the plan."""
        self.say(f"{what:{_INDENT}}{how}", _INDENT)

    def say_for_scripts(self, text: str) -> None:
        """A line that is read by programs rather than by people: in ``train.log``, or, where there is none, on the
        console unless that is a terminal."""
        if self.folder is not None:
            self._log(_encodable(text))
        elif not self.live:
            self.say(text)

    def warn(self, text: str) -> None:
        text = _encodable(f"warning: {text}")
        if self.active:
            with suppress(OSError):
                print(fit_terminal(text, sys.stderr), file=sys.stderr)
            self._log(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table on the console, and as one line in ``train.log``."""
        table = Table(*columns, title=title, title_justify="left", title_style="", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row))
        self.console.print(table)
        self._log(f"{title}: {'; '.join(' | '.join(map(str, row)) for row in rows)}")

    def _log(self, text: str) -> None:
        if self.folder is not None:
            with self._beside("train.log"), open(self.folder / "train.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @contextmanager
    def _beside(self, what: str) -> Iterator[None]:
        """A full disk in the block does not end the run: what is in checkpoints and in ``log.txt`` counts."""
        try:
            yield
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                with suppress(OSError):
                    print(
                        f"warning: {what} in {self.folder} cannot be written ({error.strerror}); the run continues, "
                        "and all of it is on the console",
                        file=sys.stderr,
                    )

    @contextmanager
    def steps(self, title: str, total: int, done: int = 0) -> Iterator[None]:
        """A live bar over `total` steps while the block runs, on a terminal."""
        if not self.live:
            yield
            return
        bar = BarColumn(bar_width=10 if self.console.width < _WIDE else 20)
        columns = (
            TextColumn("{task.description}"),
            *([bar] if self.console.width >= _NARROW else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._bar = (progress, progress.add_task(title, total=total, completed=done, news=""))
            try:
                yield
            finally:
                self._bar = None

    def let_go(self) -> None:
        """The process ends at once: its bar leaves the terminal, whose cursor comes back."""
        if self._bar is not None:
            stopping = threading.Thread(target=self._bar[0].stop, daemon=True)  # the console may be blocked
            stopping.start()
            stopping.join(_PATIENCE)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar[0].advance(self._bar[1])

    def news(self, place: str, figures: str, brief: str) -> None:
        """The latest figures: beside the bar, which shows the place, or as a line where there is no bar.

        Args:
            brief: the most important ones, for a narrow terminal.
        """
        if self._bar is not None:
            self._bar[0].update(self._bar[1], news=figures if self.console.width >= _WIDE else brief)
            self._log(f"{place} {figures}")
        else:
            self.say(f"{place} {figures}")

    def add(self, name: str, board: Board) -> None:
        """Show figures there too; `name` is what a warning calls it."""
        self._boards[name] = board

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name in list(self._boards):
            board = self._boards.pop(name)
            with self._beside(name):
                board.scalars(values, step)
                self._boards[name] = (
                    board  # else it is given up: TensorBoard's error is that of its thread, which ended
                )

    def records_from(self, epoch: int) -> None:
        """Before the first record: ``log.txt`` is brought to where the run stands.

        Raises:
            OSError: it cannot be written.
        """
        if self._records is not None:
            self._records.begin(epoch)

    def record(self, values: dict[str, Any]) -> None:
        """One JSON line in ``log.txt``."""
        if self._records is not None:
            self._records.append(values)

    def table_of_records(self) -> None:
        """Write all of ``log.txt`` as a table."""
        if self.folder is not None:
            with self._beside(TABLE), suppress(UserError):  # no record could be written
                write_table(self.folder)

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
        for name, board in self._boards.items():
            with self._beside(name):
                board.close()
        if self._thread_hook is not None:
            threading.excepthook, self._thread_hook = self._thread_hook, None
