"""``vimfast-prepare`` whose workers wait after ``HOLD`` images until they are stopped, so that a test can act in
the middle of a conversion on any machine.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from vimfast.prepare import main
from vimfast.shards import workers, writer

HOLD = int(os.environ["HOLD"])

_stored = writer.stored


def held(*args: Any) -> Any:
    shared = workers._shared  # None in the process that leads
    while shared is not None and shared.images() > HOLD and not shared.stop.is_set():
        time.sleep(0.01)
    return _stored(*args)


writer.stored = held  # in each worker too: they import this file

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests behind & has it ignored
    main()
