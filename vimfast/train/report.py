"""What a run reports: lines, JSON records, TensorBoard, a live bar."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vimfast.train.records import RecordFile


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU as torch allocated it, or of this process on a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


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
        self._board: Any = None
        self._records: RecordFile | None = None
        self._thread_hook: Callable[[threading.ExceptHookArgs], object] | None = None  # while there is a board
        if self.folder is not None:
            self._records = RecordFile(self.folder / "log.txt", self.warn)
            with self._beside("TensorBoard's file"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"))
                self._thread_hook = threading.excepthook
                threading.excepthook = partial(_report_thread, self._thread_hook)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        self._log(text)

    def warn(self, text: str) -> None:
        if self.active:
            with suppress(OSError):
                print(f"warning: {text}", file=sys.stderr)
            self._log(f"warning: {text}")

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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            self._bar = (progress, progress.add_task(title, total=total, completed=done, news=""))
            try:
                yield
            finally:
                self._bar = None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar[0].advance(self._bar[1])

    def news(self, place: str, figures: str) -> None:
        """The latest figures: beside the bar, which shows the place, or as a line where there is no bar."""
        if self._bar is not None:
            self._bar[0].update(self._bar[1], news=figures)
            self._log(f"{place} {figures}")
        else:
            self.say(f"{place} {figures}")

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:  # of its thread, which has ended
                self._board = None
                with self._beside("TensorBoard's file"):
                    raise error

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

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
        if self._board is not None:
            with self._beside("TensorBoard's file"):
                self._board.close()
        if self._thread_hook is not None:
            threading.excepthook, self._thread_hook = self._thread_hook, None
