"""Functions called where they can neither crash nor hang the program: in a forked process, for a limited time."""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")  # comes before an answer, as what a child has started may keep the pipe open after it
_PATIENCE = 4  # times as long is waited on a machine that is busy: one that is stuck may compute, too
_GRACE = 2.0  # seconds; a process that waits for a dead disk does not even end when it is killed


class Failed(Exception):
    """What was called raised an error, crashed or gave no answer; the message says which, in a few words."""


class NoAnswer(Failed):
    """It took longer than it may."""


def isolated(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns, which must be picklable. Whatever it prints is lost.

    Time in which it waits for a core to run on does not count, up to three times as much: it is not stuck where this
    machine is busy.

    Call it before anything initializes CUDA or computes gradients: neither survives a fork.

    Raises:
        Failed: it raised an exception or its process died.
        NoAnswer: it took longer than this.
    """
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's threads, which it can fork
        child = os.fork()
    if child == 0:
        _answer(function, theirs)
    os.close(theirs)
    _lead_group(child)
    try:
        answer = _read(ours, seconds, lambda: min(_waited(child), (_PATIENCE - 1) * seconds))
        status = None if answer else _wait(child)
    except TimeoutError:
        raise NoAnswer(f"no answer within {seconds:.0f} s") from None
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _wait(child)
    if not answer:
        raise Failed(_why(status))
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise Failed(value)
    result: T = value
    return result


def import_here(module: str) -> None:
    """Import what has been seen to import in a fork, so that later forks need not. Whatever it prints is lost, too."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115  # a logger that it makes may keep it
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        import_module(module)


def _lead_group(process: int) -> None:
    """Give a process a group of its own, so that what it starts ends with it.

    Parent and child both do it: whoever comes second is too late for what was started or killed in between.
    """
    with suppress(OSError):
        os.setpgid(process, process)


def _why(status: int | None) -> str:
    if status is not None and os.WIFSIGNALED(status):
        return f"crashed ({signal.Signals(os.WTERMSIG(status)).name})"
    return "ended without an answer"


def describe(error: BaseException) -> str:
    """An exception in a line: ``ImportError: libcudart.so.11.0: cannot open shared object file``."""
    if isinstance(error, Failed):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _answer(function: Callable[[], Any], to: int) -> NoReturn:
    """What the child does."""
    _lead_group(os.getpid())
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            answer = pickle.dumps((True, function()))
        except BaseException as error:  # also SystemExit, which a package may raise when it is imported
            answer = pickle.dumps((False, describe(error)))
        answer = _LENGTH.pack(len(answer)) + answer
        while answer:
            answer = answer[os.write(to, answer) :]
    finally:
        os._exit(0)


def _read(descriptor: int, seconds: float, waited: Callable[[], float]) -> bytes:
    """An answer; nothing if the process ends before it is whole.

    Args:
        waited: seconds that do not count.

    Raises:
        TimeoutError: it does not come within so many seconds.
    """
    read, wanted, until = b"", _LENGTH.size, time.monotonic() + seconds
    while len(read) < wanted:
        while not select.select([descriptor], [], [], max(0.0, until + waited() - time.monotonic()))[0]:
            if until + waited() <= time.monotonic():
                raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b""
        read += part
        if len(read) >= _LENGTH.size:
            wanted = _LENGTH.size + _LENGTH.unpack_from(read)[0]
    return read[_LENGTH.size :]


def _waited(process: int) -> float:
    """Seconds that its main thread could have run and had no core; 0 where the system does not say.

    /proc/PID/schedstat has nanoseconds on a core and nanoseconds of waiting for one.
    """
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _wait(child: int) -> int | None:
    """Its status; None where it was waited for before, or does not end."""
    until = time.monotonic() + _GRACE
    while time.monotonic() < until:
        try:
            ended, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended:
            return status
        time.sleep(0.005)
    return None
