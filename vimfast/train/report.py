"""What a run reports: lines, JSON records, TensorBoard, a live bar."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


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
        self._board = None
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))

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
            with open(self.folder / "train.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

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
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def record(self, values: dict[str, Any]) -> None:
        """One JSON line in ``log.txt``."""
        if self.folder is not None:
            with open(self.folder / "log.txt", "a") as file:
                file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
