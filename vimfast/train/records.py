"""``log.txt``: one JSON object for each epoch, in their order."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vimfast.errors import remedy
from vimfast.files import write_bytes

DROPPED = "log.dropped.txt"


class RecordFile:
    """Every line of it is a JSON object, whatever became of the disk or of the process that wrote the last one.

    Args:
        warn: is told what could not be written, or is out of place.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._pending: list[bytes] = []

    def begin(self, epoch: int) -> None:
        """Make room for the records from `epoch` on.

        A process may have been killed while it wrote a line, or before it saved the epoch that it had recorded. Such
        lines, and the records of epochs that are trained again, are moved to :data:`DROPPED`.

        Raises:
            OSError: the file cannot be read or written.
        """
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        lines = [line for line in content.split(b"\n") if line.strip()]
        kept = [line for line in lines if _is_before(line, epoch)]
        whole = b"".join(line + b"\n" for line in kept)
        if whole == content:
            return
        if dropped := [line for line in lines if line not in kept]:
            with open(self._path.with_name(DROPPED), "ab") as file:
                file.write(b"".join(line + b"\n" for line in dropped))
            self._warn(
                f"lines of {self._path} that are damaged, or of epochs from {epoch} on, which come again, are in "
                f"{DROPPED} now: {len(dropped)}"
            )
        write_bytes(self._path, whole)

    def append(self, values: dict[str, Any]) -> None:
        """Write a record, and those before it that could not be written. Where the disk is full, it waits here."""
        sound = {name: None if _is_non_finite(value) else value for name, value in values.items()}  # JSON has no NaN
        self._pending.append(json.dumps(sound).encode() + b"\n")
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                content = b"".join(self._pending)
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, "the disk is full")
                    os.fsync(file.fileno())  # before the checkpoint that follows
                except OSError:
                    with suppress(OSError):
                        file.truncate(size)  # no half line
                    raise
        except OSError as error:
            self._warn(f"{self._path} cannot be written ({error.strerror or error}); {self._unwritten(error)}")
            return
        self._pending.clear()

    def close(self) -> None:
        """Say what was never written."""
        if self._pending:
            self._warn(f"the run ends without {len(self._pending)} records of {self._path}; train.log may have them")

    def _unwritten(self, error: OSError) -> str:
        waiting = f"{len(self._pending)} records wait for the next epoch's, and the run continues"
        return f"{waiting}; {remedy(error) or 'fix that'}"


def _is_before(line: bytes, epoch: int) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    number = record.get("epoch", -1) if isinstance(record, dict) else epoch
    return isinstance(number, int) and number < epoch


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
