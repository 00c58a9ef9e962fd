"""Programs in forks of one process that has everything imported: as apart as new interpreters, without their 4 seconds.

Each has its own process id, environment, working directory, arguments, streams and exit status.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from watch import MARK, Watched

_NO_MARK = "0" * 32  # as long as what Watched marks processes with
_EVERYTHING = [
    "torch.utils.tensorboard",
    "vimfast.train.build",
    "vimfast.inference",
    "vimfast.samples",
    "conftest",
    "runs",
    "preloaded",
]


def run_forked(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
    together: bool = False,
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """``function(*arguments)`` in a fork, with all that it and its children print.

    Args:
        function: defined at the top of a module. An exception ends the fork with a traceback and status 1.
        folder: to work in; None for this process's.
        env: the whole environment; None for this process's.
        together: stdout has what is written to stderr, too, in the order in which it comes.
        seconds: after which it is killed.
    """
    with TemporaryDirectory() as place:
        streams = [os.path.join(place, name) for name in ("out", "out" if together else "err")]
        setting = (str(folder or os.getcwd()), dict(os.environ if env is None else env), streams)
        process = forking().Process(target=_run, args=(setting, function, arguments))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (Path(stream).read_text(errors="replace") if os.path.exists(stream) else "" for stream in streams)
    if together:
        err = ""
    assert process.exitcode is not None
    return subprocess.CompletedProcess([function.__name__, *map(str, arguments)], process.exitcode, out, err)


class WatchedFork(Watched):
    """A program in a fork, to be followed as any other is.

    Args:
        function: runs it; defined at the top of a module.
        arguments: of the function.
        env: added to this process's environment.
    """

    def __init__(self, function: Callable[..., object], *arguments: Any, env: Mapping[str, str]) -> None:
        self._function = function
        super().__init__(arguments, env=env)

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> Any:
        return _Fork(self._function, command, environment)


class _Fork:
    """What :class:`Watched` needs of a ``subprocess.Popen``."""

    def __init__(self, function: Callable[..., object], arguments: Sequence[Any], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        with TemporaryDirectory() as place:
            streams = [os.path.join(place, name) for name in ("out", "err")]
            for stream in streams:
                os.mkfifo(stream)
            self._process = forking().Process(target=_run, args=((os.getcwd(), env, streams), function, arguments))
            self._process.start()
            self.stdout, self.stderr = (open(stream, errors="replace") for stream in streams)  # noqa: SIM115  # for long
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        self._process.join()  # in one thread alone: it reads the status from a pipe
        self.returncode = self._process.exitcode

    def wait(self) -> int | None:
        self._waiter.join()
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_program(program: str, *flags: str) -> None:
    """What ``python -m program ...`` runs; of a ``.py`` file, ``python program ...``."""
    sys.argv = [program, *flags]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run_in_forks(program: str, *flags: str) -> None:
    """The same, where processes that it starts with multiprocessing are forks of it."""
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
    run_program(program, *flags)


def run_text(text: str, *words: str) -> None:
    """What ``python -c text words ...`` runs."""
    sys.argv = ["-c", *words]
    exec(compile(text, "<text>", "exec"), {"__name__": "__main__"})


def forking() -> Any:
    """The context of multiprocessing whose processes are forks of the one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_EVERYTHING)
    os.environ.setdefault(MARK, _NO_MARK)  # room for another, in the forked process and so in each fork
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 gives the server no sys.path, and the server ignores that it cannot import what it should.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


class WorkersInForks:
    """In the place of ``multiprocessing`` where a module starts workers: they are forks of that process, too.

    A new interpreter takes longer than most tests have work for it. Like one, a fork is given what it works on pickled,
    and this process's environment, folder and streams; it knows nothing of what a test has changed in this process.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    @staticmethod
    def get_context(method: str) -> Any:
        assert method == "spawn"
        forking()
        return _WorkersContext()


class _WorkersContext(ForkServerContext):
    def Process(self, *, target: Callable[..., object], args: tuple[Any, ...] = ()) -> Any:  # type: ignore[override]
        return super().Process(target=_work, args=(dict(os.environ), _Streams(), target, args))


class _Streams:
    """1 and 2 of the process that starts another, which has a number of its own for each."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, ([reduction.DupFd(1), reduction.DupFd(2)],)


def _work(env: dict[str, str], streams: list[Any], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    assert "preloaded" in sys.modules, "the process that is forked could not import what it should"
    for number, stream in enumerate(streams, 1):
        file = stream.detach()
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    function(*arguments)


def _mark(mark: str) -> None:
    """Have /proc/<pid>/environ of this process and its forks show it, as if it had been there from the start."""
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    found = ctypes.string_at(begin, end - begin).find(f"{MARK}=".encode())
    assert found >= 0
    ctypes.memmove(begin + found + len(MARK) + 1, mark.encode(), len(_NO_MARK))


def _run(
    setting: tuple[str, dict[str, str], list[str]], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    assert "preloaded" in sys.modules, "the process that is forked could not import what it should"
    folder, env, streams = setting
    if len(env.get(MARK, "")) == len(_NO_MARK):
        _mark(env[MARK])
    for number, stream in enumerate(streams, 1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    unbuffered = "PYTHONUNBUFFERED" in env
    sys.stdout = os.fdopen(1, "w", 1 if unbuffered else -1, errors="replace")
    sys.stderr = os.fdopen(2, "w", 1, errors="replace")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    os.setsid()  # a signal to its group is not for the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
