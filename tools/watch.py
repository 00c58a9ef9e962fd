"""A command under watch: each line of output with its time, and all processes that the command has started.

torchrun gives each worker a session of its own, so no process group contains them all. A mark in the environment, which
children inherit, identifies them.
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
    is_error: bool  # on stderr


class Usage(NamedTuple):
    """What the processes of a command use."""

    at: float
    cpu_seconds: float  # of those still alive
    memory: float  # bytes; shared memory is counted once


class Watched:
    """Starts a command and follows it; as a context manager, it leaves no process over.

    Args:
        command: program and arguments.
        env: added to this process's environment.
        cores: those that the command may use; None for those of this process.
        on_line: called with each line as it arrives, in one thread for stdout and another for stderr.
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
                os.sched_setaffinity(0, cores)  # of this thread; the child inherits it
            self.process = self._start(command, environment)
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

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # signals to the command's group must not reach this process
        )

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

    # Its output

    @property
    def out(self) -> str:
        return self._joined(False)

    @property
    def err(self) -> str:
        return self._joined(True)

    @property
    def text(self) -> str:
        """Both, in order of arrival."""
        return self._joined(False, True)

    def _joined(self, *is_error: bool) -> str:
        with self._news:
            return "".join(f"{line.text}\n" for line in self.lines if line.is_error in is_error)

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """The first match in a line of the output, past or future.

        Raises:
            RuntimeError: the command ended, or `timeout` seconds passed, without a match.
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
                raise RuntimeError(f"no line matched {pattern!r} within {timeout:.0f} s:\n{self.text}")

    def _all_read(self) -> bool:
        return self.ended is not None and not any(reader.is_alive() for reader in self._readers)

    def wait(self, timeout: float) -> int:
        """The exit status, once all output has been read.

        Raises:
            TimeoutError: `timeout` seconds passed; every process of the command was killed.
        """
        self._waiter.join(timeout)
        if self.ended is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout:.0f} s:\n{self.text}")
        for reader in self._readers:
            reader.join(1)  # a process left over may hold the pipe open; see gone_within
        return self.process.returncode

    # Its processes

    def processes(self) -> dict[int, dict[str, str]]:
        """Those alive, by process id, with their environments as of their start."""
        found = {}
        for entry in PROC.iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # not ours, or just ended
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
        """Wait for all processes to end; returns those left after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def usage(self) -> Usage:
        """Of all processes alive."""
        seconds, memory = 0.0, 0.0
        for pid in self.processes():
            with suppress(OSError, ValueError):  # it may end meanwhile
                user, system = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[11:13]
                seconds += (int(user) + int(system)) / _TICKS
                memory += _memory(PROC / str(pid))
        return Usage(time.monotonic(), seconds, memory)

    def kill(self) -> None:
        """Kill every process and wait until all are gone."""
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
    """A process's resident memory without what others have too, such as libraries.

    Their proportional share (PSS) would take the kernel a walk through all pages, 20 ms for 6 GiB, in which the process
    can neither map nor unmap any: sampled four times a second, that slows the run it is to watch.
    """
    resident, shared = (folder / "statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * float(_PAGE)
