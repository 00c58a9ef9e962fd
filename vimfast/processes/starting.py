"""Signals, and the end of the launcher, while a run starts: until its control takes over."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from vimfast.cli import exit_now, report_once, was_reported
from vimfast.errors import UserError
from vimfast.processes.hub import BEFORE_FIRST_STEP, STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TWICE = 1.0  # seconds within which the copies of one Ctrl-C arrive: the terminal sends one, torchrun another
LOOK = 0.25  # seconds between two looks at the launcher
SETTLE = 0.5  # seconds after an error, which may come before the launcher's end can be seen

LAUNCHER_NAME = "VIMFAST_LAUNCHER"  # in the environment: what started this process, if not torchrun
TORCHRUN = "torchrun"


def listen(waker: socket.socket) -> None:
    """Have each signal that stops a run written to `waker` as its number, and do nothing else.

    Python's C handler writes it at once, even while the main thread imports, waits for the device or for others.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is respected
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as a fork of a launcher begins with them blocked


def wake_sockets() -> tuple[socket.socket, socket.socket]:
    """A pair for :func:`listen`: one end to read, one for the signals."""
    wake, waker = socket.socketpair()
    wake.setblocking(False)
    waker.setblocking(False)
    return wake, waker


class Launcher(NamedTuple):
    """What has started the processes of this host, and passes signals on to them."""

    pid: int
    name: str


def find_launcher() -> Launcher | None:
    """None: this process is a run of its own."""
    return (
        Launcher(os.getppid(), os.environ.get(LAUNCHER_NAME, TORCHRUN)) if "TORCHELASTIC_RUN_ID" in os.environ else None
    )


def blurs_signals(launcher: Launcher | None) -> bool:
    """Whether a second signal may arrive as another one: torchrun turns it into SIGTERM."""
    return launcher is not None and launcher.name == TORCHRUN


def _store_is_gone() -> bool:
    """Whether the launcher ended before this process could take note of it: the store in which they meet is its."""
    on_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not on_one_host or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    with suppress(OSError, ValueError, KeyError):
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, timeout=5).close()
        except ConnectionRefusedError:
            return True
    return False


class Starting:
    """In its block, a signal or the end of its launcher ends this process with the status that docs/stopping.md lists.

    A program's main thread enters it first of all. It is over when the control calls :meth:`hand_over`.
    """

    def __init__(self) -> None:
        self.launcher = find_launcher()
        self._several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
        self._told = False  # a process of this host has said why the run ends
        self._thread = threading.Thread(target=self._watch, name="starting", daemon=True)

    def __enter__(self) -> Starting:
        self._wake, self._waker = wake_sockets()
        self._wake.settimeout(LOOK)
        listen(self._waker)
        self._thread.start()
        return self

    def hand_over(self) -> None:
        """Something else listens now. A signal that came before still ends the process."""
        self._waker.send(b"\0")
        self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():  # handed over
            return
        if self.launcher is not None and isinstance(error, Exception) and not isinstance(error, UserError):
            self._thread.join(SETTLE)
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.hand_over()

    def _watch(self) -> None:
        launcher = self.launcher
        if launcher is not None and _store_is_gone():
            self._end("launcher", f"{launcher.name} is gone")
        while True:
            try:
                received = self._wake.recv(1)
            except TimeoutError:
                received = b""
            if received == b"\0":
                return
            if received:
                name = signal.Signals(received[0]).name
                self._end(name, f"{name} received")
            if launcher is not None and os.getppid() != launcher.pid:
                self._end("launcher", f"{launcher.name} is gone")
            # The launcher ends the others when one has failed, and that one's sentence is enough.
            self._told = self._told or (self._several and was_reported())

    def _end(self, why: str, heard: str) -> None:
        if not self._told:
            report_once(f"{heard}: {BEFORE_FIRST_STEP}")
        exit_now(STOPPED[why])
