"""A command under watch: each line with the moment it came, and every process that the command has started.

torchrun gives each worker a session of its own, so that a process group does not hold them all; a mark in the
environment, which children inherit, does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

MARK = "VIMFAST_WATCHED"
PROC = Path("/proc")
_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


class Line(NamedTuple):
    """A line of a command's output; `at` is a ``time.monotonic()``."""

    at: float
    text: str
    is_error: bool  # from stderr


class Usage(NamedTuple):
    """What the processes of a command hold and have used."""

    at: float
    cpu_seconds: float  # of those that are still alive
    memory: float  # bytes, shared ones counted once


class Watched:
    """Starts a command and follows it; as a context manager it leaves no process behind.

    Args:
        command: program and arguments.
        env: added to this process's environment.
        cores: the only ones that the command may use; None for those of this process.
        on_line: called with each line as it comes, by a thread for each of stdout and stderr.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cores: Iterable[int] | None = None,
        on_line: Callable[[Line], None] | None = None,
    ) -> None:
        self.lines: list[Line] = []
        self.ended: float | None = None
        self._mark = uuid.uuid4().hex
        self._on_line = on_line
        self._news = threading.Condition()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), MARK: self._mark}
        mine = os.sched_getaffinity(0)
        self.begin = time.monotonic()
        try:
            if cores is not None:
                os.sched_setaffinity(0, cores)  # of this thread, from which the child inherits it
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,  # signals for the command's group are not for us
            )
        finally:
            if cores is not None:
                os.sched_setaffinity(0, mine)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        streams = ((self.process.stdout, False), (self.process.stderr, True))
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        self._waiter = threading.Thread(target=self._note_end, daemon=True)
        for thread in (*self._readers, self._waiter):
            thread.start()

    def _read(self, stream: IO[str], is_error: bool) -> None:
        for text in stream:
            line = Line(time.monotonic(), text.rstrip("\n"), is_error)
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
            if self._on_line is not None:
                self._on_line(line)

    def _note_end(self) -> None:
        self.process.wait()
        with self._news:
            self.ended = time.monotonic()
            self._news.notify_all()

    # What it says

    @property
    def out(self) -> str:
        return self._text(errors=False)

    @property
    def err(self) -> str:
        return self._text(errors=True)

    def _text(self, errors: bool) -> str:
        with self._news:
            return "".join(f"{line.text}\n" for line in self.lines if line.is_error == errors)

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """The first match in a line of the output so far or to come.

        Raises:
            RuntimeError: the command ended, or `timeout` seconds passed, without one.
        """
        deadline, seen = time.monotonic() + timeout, 0
        while True:
            over = time.monotonic() >= deadline or self._all_read()
            with self._news:
                fresh = self.lines[seen:]
                if not fresh and not over:
                    self._news.wait(0.2)
            seen += len(fresh)
            for line in fresh:
                if found := re.search(pattern, line.text):
                    return found
            if over and not fresh:
                raise RuntimeError(f"no line like {pattern!r} within {timeout:.0f} s:\n{self.out}{self.err}")

    def _all_read(self) -> bool:
        return self.ended is not None and not any(reader.is_alive() for reader in self._readers)

    def wait(self, timeout: float) -> int:
        """The exit status, all output read.

        Raises:
            TimeoutError: `timeout` seconds passed; every process of the command was killed.
        """
        self._waiter.join(timeout)
        if self.ended is None:
            self.kill()
            raise TimeoutError(f"no end within {timeout:.0f} s:\n{self.out}{self.err}")
        for reader in self._readers:
            reader.join(1)  # a process left behind may hold the pipe; it is the caller's to find
        return self.process.returncode

    # Its processes

    def processes(self) -> dict[int, dict[str, str]]:
        """Those alive, by process id, with the environment that each started with."""
        found = {}
        for entry in PROC.iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # another's, or just ended
                continue
            if f"{MARK}={self._mark}".encode() in words:
                pairs = (os.fsdecode(word).partition("=") for word in words if word)
                found[int(entry.name)] = {name: value for name, _, value in pairs}
        return found

    def workers(self) -> dict[int, int]:
        """Process ids of torchrun's workers, by rank."""
        everyone = self.processes()
        return {
            int(environment["RANK"]): pid
            for pid, environment in everyone.items()
            if "RANK" in environment and "RANK" not in everyone.get(_parent(pid), {})
        }

    def gone_within(self, seconds: float) -> dict[int, dict[str, str]]:
        """Wait for all processes to end; those that are left after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def usage(self) -> Usage:
        """Of all processes alive."""
        seconds, memory = 0.0, 0.0
        for pid in self.processes():
            with suppress(OSError, ValueError):  # it may end in between
                user, system = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[11:13]
                seconds += (int(user) + int(system)) / _TICKS
                memory += _memory(PROC / str(pid))
        return Usage(time.monotonic(), seconds, memory)

    def kill(self) -> None:
        """End every process at once, and wait until they are gone."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._waiter.join(5)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _memory(folder: Path) -> float:
    """A process's share of the memory (PSS), or all that it sees of it where the kernel tells no more."""
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024.0
    return int((folder / "statm").read_text().split()[1]) * float(_PAGE)
