"""The processes that write the shards, and their progress."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vimfast.cli import end_with_parent
from vimfast.errors import UserError
from vimfast.shards.plan import Part, ShardPlan
from vimfast.shards.writer import Record, write_shard

_SECONDS_BETWEEN_LINES = 10.0


def write_shards(plans: Sequence[ShardPlan], out: Path, workers: int, skip_bad: bool) -> int:
    """Write all shards that do not exist yet; returns the number of images written.

    Raises:
        UserError: unreadable images (all are listed first), or a worker cannot continue.
    """
    todo = ((plan, number) for plan in plans for number in range(plan.shards))
    pace = _WritingPace(sum(map(len, plans)))
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
    shared = Shared(context.Value("q", 0), context.Event())
    bad: list[tuple[Path, str]] = []
    running: dict[Future[tuple[Record, bool]], ShardPlan] = {}
    workers = min(workers, sum(plan.shards for plan in plans))
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool, _progress(pace) as show:
        try:
            while True:
                # Only a few parts ahead of the workers: parts are lists of names.
                with _interrupts_held():
                    while len(running) < 2 * workers and (following := next(todo, None)):
                        plan, number = following
                        running[pool.submit(_work, plan.part(number), out, skip_bad)] = plan
                if not running:
                    break
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    plan = running.pop(future)
                    record, found = future.result()
                    pace.found += record.samples + len(record.skipped) if found else 0
                    bad += [(plan.files.folder / file, why) for file, why in record.skipped]
                show(shared.written.value)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory", "run again with fewer --workers, it resumes"
            ) from None
        finally:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
    for path, why in bad:
        report(f"{path}: {why}")
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {pace.total} images cannot be read, listed above",
            "fix them, or leave them out with --skip-bad, and run again: it resumes",
        )
    return shared.written.value


def report(line: str) -> None:
    """Print a line for the user, on stderr: stdout has only the result."""
    print(line, file=sys.stderr, flush=True)


# In a worker


class Shared(NamedTuple):
    """What workers share with the run: images written, and whether to stop."""

    written: Synchronized[int]
    stop: Event


class _Stopped(Exception):
    """Ends a worker's task when the run is being stopped."""


_shared: Shared | None = None


def _start_worker(shared: Shared) -> None:
    global _shared
    _shared = shared
    warnings.simplefilter("ignore")  # Pillow's, on odd metadata of images that decode
    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(part: Part, out: Path, skip_bad: bool) -> tuple[Record, bool]:
    assert _shared is not None
    written, stop = _shared

    def tick() -> None:
        with written.get_lock():
            written.value += 1
        if stop.is_set():
            raise _Stopped

    return write_shard(part, out, skip_bad, tick)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block. It reaches the whole process group, except for processes started in the
    block: the run itself stops its workers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# Progress


class _WritingPace:
    """Progress, rate and time left. Shards that existed already count as progress but not towards the rate."""

    def __init__(self, total: int) -> None:
        self.total, self.found, self.begin = total, 0, time.monotonic()

    def describe(self, written: int) -> tuple[int, str, str]:
        """(images done, rate, time left)"""
        done = self.found + written
        rate = written / max(1e-6, time.monotonic() - self.begin)
        left = str(timedelta(seconds=round((self.total - done) / rate))) if written else "-:--:--"
        return done, f"{rate:,.0f} images/s", f"{left} left"


@contextmanager
def _progress(pace: _WritingPace) -> Iterator[Callable[[int], None]]:
    """A function to call often with the number of images written: a bar on a terminal, otherwise an occasional line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line(written: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                done, rate, left = pace.describe(written)
                report(f"{done:,} of {pace.total:,} images, {rate}, {left}")

        yield line
        return
    text = TextColumn("{task.fields[rate]}  {task.fields[left]}")
    with Progress(BarColumn(None), MofNCompleteColumn(), text, console=console, expand=True) as bar:
        task = bar.add_task("", total=pace.total, rate="", left="")

        def draw(written: int) -> None:
            done, rate, left = pace.describe(written)
            bar.update(task, completed=done, rate=rate, left=left)

        yield draw
