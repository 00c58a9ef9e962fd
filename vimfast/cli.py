"""What every entry point shares: flags with helpful errors, and how an error ends a program."""

from __future__ import annotations

import argparse
import atexit
import errno
import faulthandler
import hashlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from vimfast.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; its errors are a ``UserError``, with the nearest flag for a misspelled one."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in args:  # before argparse, which may complain of a missing flag instead
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                raise UserError(f"unknown flag {flag}{did_you_mean(flag, known)}", "--help lists all flags")
        parsed: argparse.Namespace = super().parse_args(args, namespace)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in this range."""
    limits = f"must be >= {least}" if most is None else f"must be from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer ({limits})") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{limits}, not {value}")
        return value

    return parse


def run_main(main: Callable[[], int | None], end: Callable[[int], NoReturn] = sys.exit) -> None:
    """Run an entry point: a ``UserError`` becomes one line on stderr and exit status 2, Ctrl-C becomes 130.

    Anything else is a bug and keeps its traceback.
    """
    try:
        status = main() or 0
    except UserError as error:
        report_once(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    end(status)


def end_process(status: int) -> NoReturn:
    """Exit with `status`, skipping the interpreter's own shutdown: libraries that hold the device have hung in it."""
    atexit._run_exitfuncs()
    exit_now(status)


def exit_now(status: int) -> NoReturn:
    """Exit with `status` at once."""
    backstop(2.0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def backstop(seconds: float) -> None:
    """End the process with status 1 after `seconds`, whatever holds the interpreter lock."""
    global _nowhere
    with suppress(OSError):
        _nowhere = open(os.devnull, "w")  # noqa: SIM115  # held open until the end
        faulthandler.dump_traceback_later(seconds, exit=True, file=_nowhere)


_nowhere: Any = None


def report_once(sentence: str) -> None:
    """Say why the run ends, outside the control: once per host, as usually all its processes have the same to say."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
    held = None if alone else first_on_host(_attempt())
    if alone or held is not None:
        with suppress(OSError):
            print(sentence, file=sys.stderr, flush=True)
    if held is not None:
        time.sleep(1)  # by then the others have failed too, or torchrun has ended them
        held.close()


def was_reported() -> bool:
    """Whether a process of this host is in :func:`report_once`, which takes it a second."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(_lock_address(_attempt())) in (0, errno.EAGAIN)


def _attempt() -> str:
    """Names this attempt of this run among all runs on the host."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return "-".join(os.environ.get(name, "") for name in names)


def first_on_host(name: str) -> socket.socket | None:
    """A lock that is released when its process ends: for the first on this host that asks; None for the others."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(_lock_address(name))
        lock.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            lock.close()
            return None
    return lock


def _lock_address(name: str) -> str:
    return f"\0vimfast-{hashlib.sha256(name.encode()).hexdigest()}"


def end_with_parent() -> None:
    """Run in a thread of a worker process, so that a killed program leaves no workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
