"""The processes of a run on one host, as forks of a process that has imported everything.

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
from typing import NoReturn

from vimfast.errors import UserError
from vimfast.processes.hub import RANK_LOST, STOPPED, USER_ERROR
from vimfast.processes.starting import LAUNCHER_NAME, SIGNALS

PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL for processes that are left when one has failed
_PORT = 5  # characters of a port number


def launch(program: Callable[[], None], processes: int, *, restarts: int = 0) -> int:
    """Run `program` in `processes` forks, one a rank, and wait for all of them.

    Call it before anything initializes CUDA or starts threads: neither survives a fork.

    Args:
        program: ends its process with the exit status of its rank.
        restarts: how often to start again after a failure; bad input and signals are none.

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


class _Attempt:
    def __init__(self, program: Callable[[], None], processes: int, number: int) -> None:
        self.told = False  # by a signal, to stop
        self._failed = 0  # the first status that is not 0
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGCHLD})
        gc.freeze()  # a collection in a fork would copy every page
        reading, writing = os.pipe()
        self._alive: set[int] = set()
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                self._be(rank, processes, number, reading, program)
            self._alive.add(pid)
        os.close(reading)
        # Only now, because it has threads.
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{self._store.port:{_PORT}}".encode() * processes)
        os.close(writing)

    def _be(self, rank: int, processes: int, number: int, reading: int, program: Callable[[], None]) -> NoReturn:
        """Run the program as this rank."""
        try:
            os.setsid()  # the terminal's Ctrl-C comes from the launcher, once
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
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
        """The status of the run; no process is left."""
        kill_at = None
        while self._alive:
            heard = signal.sigtimedwait({*SIGNALS, signal.SIGCHLD}, 1.0)
            if heard is not None and heard.si_signo != signal.SIGCHLD:
                self.told = True
                self._send(signal.Signals(heard.si_signo))
            self._reap()
            if self._failed not in (0, *STOPPED.values()) and kill_at is None:
                self._send(signal.SIGTERM)
                kill_at = time.monotonic() + PATIENCE
            if kill_at is not None and time.monotonic() > kill_at:
                self._send(signal.SIGKILL)
        del self._store
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return self._failed

    def _send(self, number: signal.Signals) -> None:
        for pid in self._alive:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self) -> None:
        for pid in list(self._alive):
            ended, state = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._alive.remove(pid)
                status = os.waitstatus_to_exitcode(state)
                self._failed = self._failed or (status if status >= 0 else RANK_LOST)
