"""What the system lets this process use: the cores' time and the memory of its control groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
_OWN, _MEMORY = Path("/proc/self/cgroup"), Path("/proc/meminfo")
_NO_LIMIT = 1 << 60  # bytes; version 1 has no word for none, and says a little less than 2 ** 63


class Memory(NamedTuple):
    """In bytes."""

    total: int
    available: int


def cpu_quota() -> float | None:
    """How many cores' time this process may use, which the set of its cores does not show; None: no limit."""
    quotas = []
    for version, folder in _groups("cpu"):
        if version == 2:
            words = _words(folder / "cpu.max")
        else:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        try:
            limit, period = map(int, words)
        except ValueError:  # no such file, or "max"
            continue
        if limit > 0 < period:
            quotas.append(limit / period)
    return min(quotas, default=None)


def memory() -> Memory:
    """The least of what the machine has and of what each control group allows.

    Raises:
        OSError: the system does not say.
    """
    lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
    machine = [int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable")]
    found = [Memory(*machine)]
    for version, folder in _groups("memory"):
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        try:
            most = int(_words(folder / limit)[0])
            held = int(_words(folder / used)[0])
        except (ValueError, IndexError):
            continue
        if most < _NO_LIMIT:
            statistics = _words(folder / "memory.stat")
            free = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cache, "0")
            found.append(Memory(most, max(0, most - held + int(free))))
    return Memory(min(one.total for one in found), min(one.available for one in found))


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the groups that this process is in, the outermost first.

    A container may see its own group as the outermost one, whatever the name that its processes know it by.
    """
    known: dict[str, str] = {}  # controller: group; the controller of version 2 has no name
    for line in _lines(_OWN):
        _, names, group = line.split(":", 2)
        known.update(dict.fromkeys(names.split(","), group))
    for version, top, name in ((2, CGROUPS, ""), (1, CGROUPS / controller, controller)):
        own = PurePosixPath(known.get(name, "/"))
        for outer in (*reversed(own.parents), own):
            yield version, top / outer.relative_to("/")


def _words(path: Path) -> list[str]:
    return _read(path, str.split)


def _lines(path: Path) -> list[str]:
    return _read(path, str.splitlines)


def _read(path: Path, cut: Callable[[str], list[str]]) -> list[str]:
    try:
        return cut(path.read_text())
    except OSError:
        return []
