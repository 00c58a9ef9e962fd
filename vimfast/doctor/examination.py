"""The order in which things are looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from vimfast.doctor.gpus import PART as GPUS
from vimfast.doctor.gpus import find_driver, look_at_dali, look_at_gpus
from vimfast.doctor.isolation import describe
from vimfast.doctor.lines import Line
from vimfast.doctor.machine import PART as MACHINE
from vimfast.doctor.machine import (
    idle_cores,
    look_at_cores,
    look_at_load,
    look_at_memory,
    look_at_open_files,
    look_at_shared_memory,
    threads_for,
)
from vimfast.doctor.results import Driver, Torch, Usable
from vimfast.doctor.software import PART as SOFTWARE
from vimfast.doctor.software import (
    look_at_nccl,
    look_at_optional,
    look_at_packages,
    look_at_python,
    look_at_torch,
    look_at_triton,
)

Report = Callable[[str, int, int], None]


def examine(data: Path | None = None, report: Report | None = None) -> list[Line]:
    """Look at everything that a run needs; takes seconds, or minutes where things hang.

    Call it before anything initializes CUDA or computes gradients in this process: most of it is done in forks.

    Args:
        data: shards or a folder tree whose speed is measured; None: none is.
        report: is told what is looked at next, what number it has, and how many there are.

    Returns:
        what was found, by part. What is missing or broken raises nothing: it has a red line.
    """
    return _Examination(report or (lambda what, number, of: None)).all(data)


class _Examination:
    """Collects lines, and what they are about."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._found: dict[str, list[Line]] = {}
        self._torch = Torch()
        self._driver: Driver | None = None
        self._usable = Usable()
        self._idle: float | None = None

    def all(self, data: Path | None) -> list[Line]:
        self._idle = idle_cores()  # first, as what is done here is work too
        steps: list[tuple[str, str, Callable[[], Line | list[Line]]]] = [
            (SOFTWARE, "Python", look_at_python),
            (SOFTWARE, "torch", self._look_at_torch),
            (SOFTWARE, "packages", look_at_packages),
            (GPUS, "GPUs", self._look_at_gpus),
            (SOFTWARE, "triton", lambda: look_at_triton(self._gpus)),
            (SOFTWARE, "NCCL", lambda: look_at_nccl(self._torch, self._gpus)),
            (SOFTWARE, "optional packages", look_at_optional),
            (GPUS, "DALI", lambda: look_at_dali(self._driver, self._torch, self._usable)),
            (MACHINE, "cores", lambda: look_at_cores(self._gpus)),
            (MACHINE, "other work", lambda: look_at_load(self._idle)),
            (MACHINE, "memory", lambda: look_at_memory(self._gpus)),
            (MACHINE, "/dev/shm", lambda: look_at_shared_memory(self._gpus)),
            (MACHINE, "open files", look_at_open_files),
            *([("data", str(data), lambda: self._look_at_data(data))] if data is not None else []),
            ("Vim-Tiny", "Vim-Tiny", lambda: self._look_at_backends(len(steps))),
        ]
        for number, (part, what, at) in enumerate(steps, 1):
            self._say(what, number, len(steps))
            self._look(part, what, at)
        return [line for lines in self._found.values() for line in lines]

    def _say(self, what: str, number: int, of: int) -> None:
        busy = "" if threads_for(self._idle) is None else ", slowly, as this machine is busy"
        self._report(f"{what}{busy}", number, of)

    @property
    def _gpus(self) -> int:
        """How many can be used."""
        return len(self._usable.numbers)

    def _look(self, part: str, what: str, at: Callable[[], Line | list[Line]]) -> None:
        try:
            lines = at()
        except Exception as error:  # whatever is broken, the others are to be looked at
            fix = "fix what is red above; if nothing is, report it with the output of vimfast doctor --json"
            lines = Line(part, what, "red", f"cannot be looked at ({describe(error)})", fix)
        self._found.setdefault(part, []).extend([lines] if isinstance(lines, Line) else lines)

    def _look_at_torch(self) -> Line:
        line, self._torch = look_at_torch()
        return line

    def _look_at_gpus(self) -> list[Line]:
        self._driver = find_driver()
        lines, self._usable = look_at_gpus(self._driver, self._torch)
        return lines

    # Imported only here, as what they import may be missing.

    def _look_at_data(self, folder: Path) -> Line:
        from vimfast.doctor.storage import look_at_data

        return look_at_data(folder, self._gpus)

    def _look_at_backends(self, number: int) -> list[Line]:
        from vimfast.doctor.backends import look_at_backends

        begin = partial(self._say, number=number, of=number)
        return look_at_backends(self._usable, threads_for(self._idle), lambda name: begin(f"Vim-Tiny on {name}"))
