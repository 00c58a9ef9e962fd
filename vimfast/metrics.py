"""What a run tells: sums that live on the device, JSON lines, TensorBoard, a live bar or plain lines."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from vimfast import dist


class Sums:
    """Named running sums on the device, read once for all of them: adding costs no host sync, `read` costs one.

    `read` sums over the processes too.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, *values: Tensor | float) -> None:
        for own, value in zip(self.values, values, strict=True):  # a number goes in with the launch, without a copy
            own += value

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, dist.all_sum(self.values.clone()).tolist(), strict=True))


@dataclass
class Pace:
    """Where the time goes between two reports: steps, images, and the part of it spent waiting for data.

    On a GPU that is the time in which the GPU is idle between the end of a step and the batch of the next one; the
    host, which is steps ahead, may wait for data without any harm. On a CPU run it is the host's waiting.
    """

    world_size: int
    steps: int = 0
    images: int = 0
    waited: float = 0.0
    since: float = 0.0
    _idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def start(self) -> None:
        self.steps, self.images, self.waited, self.since = 0, 0, 0.0, time.perf_counter()
        self._idle.clear()

    def wait_for(self, batches: Iterator[Any]) -> Any:
        """The next batch or None, its waiting time noted."""
        begin = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - begin
        return batch

    def between(self, end: torch.cuda.Event | None, ready: torch.cuda.Event | None) -> None:
        """The end of a step and the moment at which the batch of the next is ready, both recorded with timing."""
        if self.steps and end is not None and ready is not None:  # before the first step here, other things were done
            self._idle.append((end, ready))

    def count(self, images: int) -> None:
        self.steps += 1
        self.images += images

    def report(self) -> dict[str, float]:
        """``img_s`` over all processes, ``data_share`` of the time spent waiting, and seconds a step.

        On a GPU, call it when the device has done all of the steps.
        """
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        waited = self.waited
        if self._idle:
            waited = sum(max(0.0, end.elapsed_time(ready)) for end, ready in self._idle) / 1000
        return {
            "img_s": self.images * self.world_size / elapsed,
            "data_share": min(waited / elapsed, 1.0),
            "step_s": elapsed / max(self.steps, 1),
        }


class StartUp:
    """How long it took from the command to the first step, and what with."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts: dict[str, float] = {}
        for name, seconds in _ages():
            self._parts[name] = seconds

    def done(self, part: str) -> None:
        """What was done since the last call."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items() if seconds >= 0.05)
        return f"first step {sum(self._parts.values()):.1f} s after the command ({parts})"


def _ages() -> list[tuple[str, float]]:
    """Seconds that torchrun took to start this process, if it did, and that this process has lived."""
    try:
        own, now = _started(os.getpid()), time.clock_gettime(time.CLOCK_BOOTTIME)
        parent = _started(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else own
    except (OSError, ValueError, IndexError):  # no /proc
        return []
    return [("torchrun", own - parent), ("imports", now - own)]


def _started(pid: int) -> float:
    """Seconds between the machine's start and a process's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


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
    """Tells the main process's news, and is silent on the others.

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
