"""The processes that verify and write the shards, and their progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vimfast.cli import end_with_parent, fit_terminal
from vimfast.errors import UserError, duration, one_line
from vimfast.shards.format import shard_name
from vimfast.shards.plan import Part, ShardPlan
from vimfast.shards.stored import Mirror, verify_in_store, write_to_store
from vimfast.shards.verify import Differs, verify_shard
from vimfast.shards.writer import Record, record_path, write_shard

P = TypeVar("P")
T = TypeVar("T")
Place: TypeAlias = tuple[str, int]  # a shard: its split and number

_SECONDS_BETWEEN_LINES = 10.0


class Engine(Protocol):
    """What does the work on shards: processes of this machine, or a cluster."""

    def run(
        self, function: Callable[..., T], todo: Sequence[P], arguments: Callable[[P], tuple[Any, ...]], pace: Pace
    ) -> Iterator[tuple[P, T]]:
        """As :func:`run` does."""


class Processes(NamedTuple):
    """Of this machine."""

    workers: int

    def run(
        self, function: Callable[..., T], todo: Sequence[P], arguments: Callable[[P], tuple[Any, ...]], pace: Pace
    ) -> Iterator[tuple[P, T]]:
        """:func:`run`."""
        return run(function, todo, arguments, self.workers, pace)


def verify_shards(
    plans: Sequence[ShardPlan], out: Path, engine: Engine, mirror: Mirror | None = None
) -> dict[Place, Record]:
    """The records of the shards that an earlier run has finished and that still hold; reports those that do not.

    Args:
        mirror: `out` is its folder, and the shards are in a store; None: they are in `out`.

    Raises:
        UserError: a worker cannot continue.
    """
    places = [(plan, number) for plan in plans for number in range(plan.shards)]
    todo = [(plan, number) for plan, number in places if record_path(out, plan.split, number).exists()]
    kept: dict[Place, Record] = {}
    if not todo:
        return kept
    pace = Pace(sum(plan.samples(number) for plan, number in todo), "images verified")
    target = out if mirror is None else mirror.url
    for (plan, number), outcome in engine.run(_verify, todo, lambda place: (place[0].part(place[1]), target), pace):
        if isinstance(outcome, Record):
            kept[plan.split, number] = outcome
        else:
            report(f"{target}/{shard_name(plan.split, number)} {outcome}: it is made again")
    return kept


def write_shards(
    plans: Sequence[ShardPlan],
    out: Path,
    engine: Engine,
    skip_bad: bool,
    kept: Mapping[Place, Record],
    mirror: Mirror | None = None,
) -> int:
    """Write all shards but those that are `kept`; returns the number of images written.

    Raises:
        UserError: unreadable images (all are listed first), or a worker cannot continue.
    """
    pace = Pace(sum(map(len, plans)), "images", sum(r.samples + len(r.skipped) for r in kept.values()))
    files = {plan.split: plan.files for plan in plans}
    todo = [(plan, number) for plan in plans for number in range(plan.shards) if (plan.split, number) not in kept]
    bad = [(files[split].describe(file), why) for (split, _), record in kept.items() for file, why in record.skipped]
    write = partial(_write, skip_bad=skip_bad)
    target = out if mirror is None else mirror.url
    for (plan, number), record in engine.run(write, todo, lambda place: (place[0].part(place[1]), target), pace):
        bad += [(plan.files.describe(file), why) for file, why in record.skipped]
        if mirror is not None:
            mirror.collect(plan.split, number)
        unwritten = record.skipped and not skip_bad
        if not unwritten and not record_path(out, plan.split, number).exists():
            raise UserError(
                f"{out / shard_name(plan.split, number)} was written where this machine does not see it",
                "give an --out that all nodes of the cluster share",
            )
    for name, why in bad:
        report(f"{name}: {why}")
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {pace.total} images cannot be read, listed above",
            "fix them, or leave them out with --skip-bad, and run again: it resumes",
        )
    return pace.done


def run(
    function: Callable[..., T], todo: Sequence[P], arguments: Callable[[P], tuple[Any, ...]], workers: int, pace: Pace
) -> Iterator[tuple[P, T]]:
    """Do `function` for each shard, in worker processes; what came of them, as they are done.

    Args:
        arguments: of `function`, for one of `todo`; asked for only as workers become free, as they may be large.

    Raises:
        UserError: a worker was killed, or cannot continue.
    """
    if not todo:
        return
    following = iter(todo)
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
    workers = min(workers, len(todo))
    shared = Shared(
        context.Value("q", 0),
        context.RawArray("q", workers),
        context.RawArray("c", workers * _NAME_BYTES),
        context.Event(),
    )
    running: dict[Future[T], P] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool, progress(pace) as show:
        try:
            while True:
                with _interrupts_held():
                    while len(running) < 2 * workers and (place := next(following, None)) is not None:
                        running[pool.submit(function, *arguments(place))] = place
                if not running:
                    break
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                pace.done = shared.images()
                show()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps for lack of memory, with {', '.join(shared.in_work())} in work",
                "run again with fewer --workers, it resumes; if one image is always among these, remove it",
            ) from None
        finally:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
            pace.done = shared.images()


def report(line: str) -> None:
    """Print a line for the user, on stderr: stdout has only the result. If nobody can hear it, work continues."""
    with suppress(OSError):
        print(fit_terminal(one_line(line), sys.stderr), file=sys.stderr, flush=True)


# In a worker


class Shared(NamedTuple):
    """What workers share with the run. Each has a place of its own in the arrays, which need no lock: a worker that is
    killed would keep it."""

    started: Synchronized[int]  # workers
    done: Any  # of each, the images
    names: Any  # of each, the image that it is at, in _NAME_BYTES bytes
    stop: Event

    def images(self) -> int:
        """How many are done."""
        return sum(self.done)

    def in_work(self) -> list[str]:
        """The names of the images that workers are at."""
        slots = [bytes(self.names[at : at + _NAME_BYTES]) for at in range(0, len(self.names), _NAME_BYTES)]
        return [os.fsdecode(slot.rstrip(b"\0")) for slot in slots if slot.strip(b"\0")]


class _Stopped(Exception):
    """Ends a worker's task when the run is being stopped."""


_NAME_BYTES = 256  # the end of a longer one says enough
_shared: Shared | None = None
_place = 0  # of this worker in the arrays
_elsewhere: Callable[[str, int], None] | None = None  # where this process is none of these workers


def _start_worker(shared: Shared) -> None:
    global _shared, _place
    _shared = shared
    with shared.started.get_lock():
        _place = shared.started.value
        shared.started.value += 1
    warnings.simplefilter("ignore")  # Pillow's, on odd metadata of images that decode
    threading.Thread(target=end_with_parent, daemon=True).start()


def _write(part: Part, out: Path | str, *, skip_bad: bool) -> Record:
    if isinstance(out, str):
        return write_to_store(part, out, skip_bad, tick)
    # A node of a cluster that was given up may still be writing what is written again here.
    mark = "" if _elsewhere is None else f".{socket.gethostname()}-{os.getpid()}"
    return write_shard(part, out, skip_bad, tick, mark)


def _verify(part: Part, out: Path | str) -> Record | str:
    """The record of a shard that holds, or why it has to be made again."""
    try:
        return verify_in_store(part, out, tick) if isinstance(out, str) else verify_shard(part, out, tick)
    except Differs as why:
        return str(why)


def tick(name: str, count: int = 1) -> None:
    """Count what is done and note its name, and end here if the run is being stopped."""
    if _elsewhere is not None:
        _elsewhere(name, count)
        return
    assert _shared is not None
    _shared.done[_place] += count
    end = (_place + 1) * _NAME_BYTES
    _shared.names[end - _NAME_BYTES : end] = os.fsencode(name)[-_NAME_BYTES:].ljust(_NAME_BYTES, b"\0")
    if _shared.stop.is_set():
        raise _Stopped


@contextmanager
def tick_with(function: Callable[[str, int], None]) -> Iterator[None]:
    """In the block, in a process that :func:`run` did not start, :func:`tick` calls `function` instead."""
    global _elsewhere
    _elsewhere = function
    try:
        yield
    finally:
        _elsewhere = None


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


class Pace:
    """Progress, rate and time left. What was there already counts as progress but not towards the rate.

    Args:
        total: None: not known.
    """

    def __init__(self, total: int | None, what: str, found: int = 0, unit: str = "images") -> None:
        self.total, self.what, self.found, self.unit, self.begin = total, what, found, unit, time.monotonic()
        self.done = 0

    def describe(self) -> tuple[int, str, str]:
        """(images done, rate, time left, which is empty where the total is not known)"""
        done = self.found + self.done
        rate = self.done / max(1e-6, time.monotonic() - self.begin)
        left = duration((self.total - done) / rate) if self.done and self.total is not None else "-:--:--"
        return done, f"{rate:,.0f} {self.unit}/s", "" if self.total is None else f"{left} left"

    def __str__(self) -> str:
        done, rate, left = self.describe()
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{done:,}{of} {self.what}, {rate}{left and f', {left}'}"


@contextmanager
def progress(pace: Pace) -> Iterator[Callable[[], None]]:
    """A function to call often: a bar on a terminal, otherwise an occasional line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line() -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                report(str(pace))

        yield line
        return
    text = TextColumn("{task.fields[rate]}  {task.fields[left]}")
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), text)
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(pace.what, total=pace.total, rate="", left="")

        def draw() -> None:
            done, rate, left = pace.describe()
            bar.update(task, completed=done, rate=rate, left=left)

        yield draw


def passing(things: Iterable[T], pace: Pace, at_once: int = 1) -> Generator[T, None, None]:
    """The same; meanwhile it is shown how many have been passed, after each `at_once` of them."""
    with progress(pace) as show:
        for thing in things:
            yield thing
            pace.done += 1
            if pace.done % at_once == 0:
                show()
        show()
