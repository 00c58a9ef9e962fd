"""The processes of a run on one host, as forks of a process that has imported torch.

torchrun imports torch and then starts interpreters that import it again, which is most of a short run. Forks share what
was imported before them. They are told what torchrun would tell them, so that the rest of a run cannot tell the
difference; but a signal reaches them as the one that it is, and the status of the run is that of its processes.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from vimfast.errors import UserError
from vimfast.processes.hub import BEFORE_FIRST_STEP, RANK_LOST, STALLED, STOPPED, USER_ERROR
from vimfast.processes.starting import LAUNCHER_NAME, SIGNALS, TWICE

PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL for processes that are left when one has failed
IMPATIENCE = 5.0  # seconds between a second Ctrl-C and SIGKILL; a process that can end does so in less
_OWN = {signal.SIGCHLD, signal.SIGALRM}  # what a launcher wakes up at, beside what it passes on
_PORT = 5  # characters of a port number


def end_at_signals() -> None:
    """Until :func:`launch` takes over, a signal ends this process at once, with the status that docs/stopping.md lists.

    A KeyboardInterrupt would not do: raised while an extension module is imported, it can be lost.
    """

    def end(number: int, frame: Any) -> NoReturn:
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"{name} received: {BEFORE_FIRST_STEP}\n".encode())
        os._exit(STOPPED[name])

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def launch(program: Callable[[], None], processes: int, *, restarts: int = 0) -> int:
    """Run `program` in `processes` forks, one a rank, and wait for all of them.

    Call it before anything initializes CUDA or starts threads: neither survives a fork.

    Args:
        program: ends its process with the exit status of its rank; signals are blocked until it listens to them.
        restarts: how often to start again after a failure; bad input and signals do not count as one.

    Returns:
        0, or the status of the rank that failed first; docs/stopping.md lists them.
    """
    if "RANK" in os.environ:
        raise UserError("--processes starts processes, and torchrun has started this one already", "drop one of them")
    attempt = 0
    while True:
        run = _Attempt(program, processes, attempt)
        status = run.wait()
        if status in (0, USER_ERROR, *STOPPED.values()) or run.told or attempt == restarts:
            return status
        attempt += 1
        print(f"exit status {status}; starting again ({attempt} of {restarts})", file=sys.stderr, flush=True)


def _suspend() -> None:
    """What Ctrl-Z does to a command. Its processes may be inside a collective, which would fail if it took too long."""
    with suppress(OSError):
        os.write(2, b"suspended: this command alone, its processes keep training; fg or bg brings it back\n")
    os.kill(os.getpid(), signal.SIGSTOP)


class _Attempt:
    def __init__(self, program: Callable[[], None], processes: int, number: int) -> None:
        self.told = False  # a signal has asked the run to stop
        self._interrupted: float | None = None  # when Ctrl-C came first
        self._forced = False  # by a second Ctrl-C
        self._killed = ""  # by which signal the first rank was, if the run failed by that
        self._failed = 0  # the first status that is not 0
        # What is ignored, such as SIGHUP under nohup, is left alone: sigwait would return it.
        heard = {number for number in (*SIGNALS, signal.SIGTSTP) if signal.getsignal(number) != signal.SIG_IGN}
        self._heard = {*heard, *_OWN}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._heard)
        gc.freeze()  # a collection in a fork would copy every page
        reading, writing = os.pipe()
        self._alive: dict[int, int] = {}  # ranks, by process
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                self._run_rank(rank, processes, number, reading, program)
            self._alive[pid] = rank
        os.close(reading)
        # After the forks: it starts threads, which do not survive a fork.
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{self._store.port:{_PORT}}".encode() * processes)
        os.close(writing)

    def _run_rank(self, rank: int, processes: int, number: int, reading: int, program: Callable[[], None]) -> NoReturn:
        """Run the program as this rank."""
        try:
            os.setsid()  # the terminal's Ctrl-C comes from the launcher, once
            # The others stay blocked until the program listens to them, lest one arrives before.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_OWN, signal.SIGTSTP})
            port = os.read(reading, _PORT)
            if not port:  # the launcher is gone
                os._exit(STOPPED["launcher"])
            os.close(reading)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port.decode().strip(),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RUN_ID=f"vimfast-{os.getppid()}",
                TORCHELASTIC_RESTART_COUNT=str(number),
            )
            os.environ[LAUNCHER_NAME] = "vimfast train"
            program()
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # a program that ends as it should has ended its process by now

    def wait(self) -> int:
        """Wait for all processes; returns the status of the run."""
        ending = False
        while self._alive:
            # Not sigtimedwait: in Python, it returns any number at all if this process was suspended for longer.
            heard = signal.Signals(signal.sigwait(self._heard))
            if heard == signal.SIGTSTP:
                _suspend()
            elif heard == signal.SIGALRM:
                if not self._failed:  # no rank has answered a second Ctrl-C
                    self._failed = STOPPED["SIGINT"]
                    print("interrupted again: the processes do not answer and are killed", file=sys.stderr, flush=True)
                self._send(signal.SIGKILL)
            elif heard != signal.SIGCHLD:
                self.told = True
                self._send(heard)
                if heard == signal.SIGINT:
                    self._interrupt(time.monotonic())
            self._reap()
            if self._failed and not ending:
                ending = True
                self._send(signal.SIGTERM)
                if not self._forced:
                    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._killed:
            print(f"error: {self._killed}", file=sys.stderr, flush=True)
        del self._store
        if signal.SIGALRM in signal.sigpending():
            signal.sigwait({signal.SIGALRM})
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return self._failed

    def _interrupt(self, now: float) -> None:
        """A second Ctrl-C ends the run at once, also where a rank is frozen."""
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > TWICE and not self._forced:
            self._forced = True
            signal.setitimer(signal.ITIMER_REAL, IMPATIENCE)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._alive:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self) -> None:
        while self._alive:
            pid, state = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            rank, status = self._alive.pop(pid, None), os.waitstatus_to_exitcode(state)
            if status < 0 and not self._failed:
                self._killed = f"rank {rank} (pid {pid}) was killed by {signal.Signals(-status).name}"
            elif self._killed and status in (RANK_LOST, STALLED):  # this one has said so, or has killed a frozen one
                self._killed, self._failed = "", status
            self._failed = self._failed or (status if status >= 0 else RANK_LOST)
