"""The time from a command to its first step, part by part."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vimfast.processes.starting import LAUNCHER_NAME


class StartUp:
    """How long it took from the command to the first step, and what with."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts: dict[str, float] = {}
        for name, seconds in _ages():
            self._parts[name] = seconds

    def done(self, part: str) -> None:
        """What was done since the last call."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts.items() if seconds >= 0.05)
        return f"first step {sum(self._parts.values()):.1f} s after the command ({parts})"


def _ages() -> list[tuple[str, float]]:
    """Seconds that the launcher took to start this process, if one did, and that this process has lived."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return []  # the launcher is as old as the first attempt
    try:
        own, now = _started(os.getpid()), time.clock_gettime(time.CLOCK_BOOTTIME)
        parent = _started(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else own
    except (OSError, ValueError, IndexError):  # no /proc
        return []
    return [(os.environ.get(LAUNCHER_NAME, "torchrun"), own - parent), ("imports", now - own)]


def _started(pid: int) -> float:
    """Seconds between the machine's start and a process's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
