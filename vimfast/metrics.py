"""What a run tells: sums that live on the device, JSON lines, TensorBoard, a live bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

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
    """Where the host's time goes, between two reports: steps, pictures, and seconds spent waiting for data."""

    world_size: int
    steps: int = 0
    pictures: int = 0
    waited: float = 0.0
    since: float = 0.0

    def start(self) -> None:
        self.steps, self.pictures, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterator[Any]) -> Any:
        """The next batch or None, its waiting time noted."""
        begin = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - begin
        return batch

    def count(self, pictures: int) -> None:
        self.steps += 1
        self.pictures += pictures

    def report(self) -> dict[str, float]:
        """``img_s`` over all processes, ``data_share`` of the time spent waiting, and seconds a step."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        return {
            "img_s": self.pictures * self.world_size / elapsed,
            "data_share": self.waited / elapsed,
            "step_s": elapsed / max(self.steps, 1),
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU as torch allocated it, or of this process on a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Reporter:
    """Tells the main process's news, and is silent on the others.

    In `folder`, if one is given: every line in ``train.log``, one JSON object an epoch in ``log.txt``, and TensorBoard.
    On a terminal a live bar shows the place in the epoch; elsewhere the same figures come as plain lines.
    """

    def __init__(self, folder: Path | None, active: bool) -> None:
        self.active = active
        self.folder = folder if active else None
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.live = active and self.console.is_terminal
        self._bar: tuple[Progress, Any] | None = None
        self._board = None
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def say(self, text: str) -> None:
        with suppress(OSError):  # a terminal that has gone must not end a run that is to save its place
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
