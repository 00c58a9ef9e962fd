"""torchrun, but its workers are forks of it that have everything imported, where its own are new interpreters.

A run of a few steps on two processes spends nearly all its time on three imports of torch; this one imports it once.
Everything else is real: process ids, parents, sessions, environments, signal handlers. Only /proc/<pid>/environ of a
worker shows torchrun's environment.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import subprocess
import sys
import traceback
from typing import Any

import torch.utils.tensorboard  # noqa: F401  # as below, for the forks
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import vimfast.train.build  # noqa: F401
from vimfast.data.decoding import import_dali


def fork(args: tuple[str, ...], env: dict[str, str], **options: Any) -> subprocess.Popen:
    """A ``Popen`` of ``python -u [-m] program ...`` that runs the program where it would start an interpreter."""

    def program() -> None:
        # What exec does: close files, among them the one whose end the parent waits for, and reset signal handlers.
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        gc.enable()  # Popen disables it around preexec_fn
        os.environ.clear()
        os.environ.update(env)
        is_module = args[2] == "-m"
        sys.argv = list(args[2 + is_module :])
        try:
            (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # a program that ends as it should has ended its process by now

    return subprocess.Popen(args, env=env, preexec_fn=program, **options)


def torchrun(*words: str) -> None:
    """What the command ``torchrun`` does with these words."""
    subprocess_handler.Popen = fork  # type: ignore[attr-defined]
    run.main(words)


if __name__ == "__main__":
    import_dali()
    gc.freeze()  # a collection in a fork would copy every page
    torchrun(*sys.argv[1:])
