"""What a process says before it ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TextIO

from vimfast.cli import fit_terminal, leave_word
from vimfast.processes.hub import Peer

TRACE = 20_000  # last characters of a traceback that are reported


def report(sentence: str, trace: str, log: Path | None, *, aloud: bool = True) -> None:
    """To the launcher, and, if `aloud`, to the console, after the traceback, and to the run's `log`; either may be
    broken by now."""
    leave_word(sentence)
    if not aloud:
        return
    print_at_once(f"{trace}{fit_terminal(sentence, sys.__stderr__)}\n")
    if log is not None and log.parent.is_dir():
        with suppress(OSError), open(log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")


def dump_stacks(rank: int, folder: Path | None, *, to_console: bool) -> None:
    """Of all threads of this process, to ``stall-rankN.txt`` in `folder`."""
    with open(os.memfd_create("stacks"), "w+") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        stacks = memory.read()
    if to_console:
        print_at_once(f"stacks of rank {rank}:\n{stacks}")
    if folder is not None:
        with suppress(OSError):
            (folder / f"stall-rank{rank}.txt").write_text(stacks)


def line_of_main_thread() -> str:
    """The line of code that it is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def let_others_read(connections: dict[Connection, int], seconds: float) -> None:
    """Wait until they have closed: closing first, with unread input, would discard what was last sent to them."""
    end = time.monotonic() + seconds
    while connections and time.monotonic() < end:
        for connection in wait(list(connections), timeout=end - time.monotonic()):
            try:
                connection.recv_bytes()  # type: ignore[union-attr]
            except (EOFError, OSError):  # noqa: PERF203
                del connections[connection]  # type: ignore[arg-type]


def state(peer: Peer, host: str) -> str:
    """Of a process that does not answer, if it is on this `host`."""
    if peer.host != host:
        return ""
    with suppress(OSError):
        for line in Path(f"/proc/{peer.pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return f" (its process is in state {line.split(maxsplit=1)[1]})"
    return ""


def print_at_once(text: str, stream: TextIO | None = sys.__stderr__) -> None:
    """Print to the console, if it is still there, in one write: lines of several processes must not mingle."""
    with suppress(OSError, ValueError):
        print(text, end="", file=stream, flush=True)


def format_trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACE:]


def is_collective(error: BaseException) -> bool:
    """Whether an error only says that the processes have lost each other."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "process group", "processgroup")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
