"""Where the time goes between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Stretch(NamedTuple):
    """Steps between two reports."""

    steps: int  # batches, with accumulation
    images: int  # of this process
    waited: float  # seconds, of the host
    idle: list[tuple[torch.cuda.Event, ...]]  # end of a step; next batch asked for, and ready
    on_gpu: bool

    def data_share(self, seconds: float) -> float:
        """Share of the time spent waiting for data; on a GPU, once the device has done all of the steps."""
        waited = self.waited
        if self.on_gpu:
            # A host that comes late to ask, because it saves or runs code of others, does not wait for data.
            spans = ((end.elapsed_time(ready), asked.elapsed_time(ready)) for end, asked, ready in self.idle)
            waited = sum(max(0.0, min(span)) for span in spans) / 1000
        return min(waited / max(seconds, 1e-9), 1.0)


class Spent(NamedTuple):
    """Images of all processes, and seconds that this one took for them, of which it waited for data."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Pace:
    """Counts steps and images of an epoch, and the part of the time spent waiting for data.

    On a GPU that is the time in which the GPU is idle between the end of a step and the batch of the next one; the
    host, which is steps ahead, may wait for data without any harm. On a CPU run it is the host's waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self.spent = Spent()  # in the stretches that were reported
        self._on_gpu = device.type == "cuda"
        self._stretch, self._begun = Stretch(0, 0, 0.0, [], self._on_gpu), False

    def cut(self) -> Stretch:
        """What was counted since the last cut."""
        done, self._stretch = self._stretch, Stretch(0, 0, 0.0, [], self._on_gpu)
        return done

    def spend(self, images: int, seconds: float, data_share: float) -> None:
        """Add a stretch to what was spent."""
        spent = self.spent
        self.spent = Spent(spent.images + images, spent.seconds + seconds, spent.waited + data_share * seconds)

    def wait_for(self, batches: Iterator[T]) -> T | None:
        """The next batch or None, its waiting time noted."""
        begin = time.perf_counter()
        batch = next(batches, None)
        self._stretch = self._stretch._replace(waited=self._stretch.waited + time.perf_counter() - begin)
        return batch

    def between(
        self, end: torch.cuda.Event | None, asked: torch.cuda.Event | None, ready: torch.cuda.Event | None
    ) -> None:
        """The end of a step, and the moments at which the batch of the next was asked for and was ready."""
        # The gap before the first step is start-up, not waiting for data.
        if self._begun and end is not None and asked is not None and ready is not None:
            self._stretch.idle.append((end, asked, ready))

    def count(self, images: int) -> None:
        done, self._begun = self._stretch, True
        self._stretch = done._replace(steps=done.steps + 1, images=done.images + images)
