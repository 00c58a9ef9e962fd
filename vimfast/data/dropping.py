"""Closes what was dropped without having been closed, in a thread of its own.

``__del__`` may run in any line of any thread, also in one that holds a lock of ``threading`` or of a pool that closing
needs: it would wait for itself.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
from queue import SimpleQueue
from typing import Protocol


class Closes(Protocol):
    """Has threads or memory to let go of."""

    def close(self) -> None:
        """Let go of them."""


@functools.cache
def closer(process: int) -> SimpleQueue[Closes | None]:
    """What is put into it is closed soon, and before the process ends.

    Args:
        process: this one's id. A fork has none of the threads of the process that it is of.
    """
    dropped: SimpleQueue[Closes | None] = SimpleQueue()  # whose put() takes no lock that its thread may hold
    thread = threading.Thread(target=_close_each, args=(dropped,), name="closer", daemon=True)
    thread.start()
    atexit.register(_end, dropped, thread)
    return dropped


def _close_each(dropped: SimpleQueue[Closes | None]) -> None:
    while (one := dropped.get()) is not None:
        try:
            one.close()
        except Exception:
            sys.excepthook(*sys.exc_info())  # as of any __del__, nobody is there to catch it
        del one  # else it lived until the next comes


def _end(dropped: SimpleQueue[Closes | None], thread: threading.Thread) -> None:
    dropped.put(None)
    thread.join(10.0)
