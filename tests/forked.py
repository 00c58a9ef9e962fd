"""Programs in forks of one process that has everything imported: as apart as new interpreters, without their 4 seconds.

Each has its own process id, environment, working directory, arguments, streams and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_EVERYTHING = ["torch.utils.tensorboard", "vimfast.train.build", "vimfast.inference", "vimfast.samples", "preloaded"]


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_EVERYTHING)
    with TemporaryDirectory() as place:
        streams = [os.path.join(place, name) for name in ("out", "out" if together else "err")]
        setting = (str(folder or os.getcwd()), dict(os.environ if env is None else env), streams)
        process = context.Process(target=_run, args=(setting, function, arguments))
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


def run_program(program: str, *flags: str) -> None:
    """What ``python -m program ...`` runs; of a ``.py`` file, ``python program ...``."""
    sys.argv = [program, *flags]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _run(
    setting: tuple[str, dict[str, str], list[str]], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    folder, env, streams = setting
    for number, stream in enumerate(streams, 1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", errors="replace")
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
