"""``vimfast-prepare`` that dies, with all its processes, before its operation number ``DIE_AT`` that makes something
visible, durable or gone. ``OPERATIONS`` names the file that they are counted in, a byte each.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from vimfast.prepare import main


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        counter = os.open(os.environ["OPERATIONS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(counter, b".")
        done = os.fstat(counter).st_size
        os.close(counter)
        if done == int(os.environ["DIE_AT"]):
            os.killpg(0, signal.SIGKILL)
        return function(*args, **options)

    return call


for name in ("replace", "fsync", "unlink"):  # in each worker too: they import this file
    setattr(os, name, counted(getattr(os, name)))

if __name__ == "__main__":
    main()
