"""The rate of a loader whose batches are dropped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from vimfast.data.loader import Loader
from vimfast.data.views import Batch

WARM_UP_BATCHES = 8


def endless(loader: Loader) -> Iterator[Batch]:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def measure_batches(
    batches: Iterator[int], seconds: float, finish: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Images per second and processor cores in use, after a warm-up.

    Args:
        batches: how many images each has, without end.
        finish: waits for what is still on its way.
    """
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    if finish:
        finish()
    begin, processor, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        images += next(batches)
    if finish:
        finish()
    wall = time.perf_counter() - begin
    return images / wall, (time.process_time() - processor) / wall
