"""What of the machine this process may use: cores, memory, shared memory, open files."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from vimfast.doctor.lines import Line, State
from vimfast.errors import counted
from vimfast.limits import cpu_quota, memory

PART = "machine"
_CORES = 6  # for each GPU; fewer leave most of the decoding to the GPU
_MEMORY = 4 << 30  # bytes, for each process of a run
_SHARED = 1 << 30  # bytes, for NCCL
_LOOK = 0.5  # seconds, in which other work is seen
_BUSY = 0.5  # of the cores idle; where fewer are, times are not those of this machine alone
_KINDS, _IDLE = 9, slice(3, 5)  # of a line of /proc/stat: without guests' time, counted twice; idle, also for a disk
_FILES = 1024  # with fewer, ImageNet's 326 shards are not all kept open


def look_at_cores(gpus: int) -> Line:
    """Those that the affinity of this process, or its container, allows."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    cores = _usable_cores()
    found = f"{allowed} of {os.cpu_count()}" + ("" if quota is None else f", {quota:g} cores' time in this container")
    figures = {"cores": cores, "allowed": allowed, "machine": os.cpu_count(), "quota": quota}
    if cores < _CORES * gpus:
        fix = (
            "give the job more (--cpus-per-task, --cpus), or make shards that are quick to decode: "
            "vimfast prepare DATA --out small/ --resize 256"
        )
        return Line(PART, "cores", "yellow", f"{found}; few for {gpus} GPU{'s' * (gpus > 1)}", fix, figures)
    return Line(PART, "cores", "green", found, figures=figures)


def _usable_cores() -> float:
    """How many cores' time this process may use."""
    allowed, quota = float(len(os.sched_getaffinity(0))), cpu_quota()
    return allowed if quota is None else min(allowed, quota)


def idle_cores(stat: Path = Path("/proc/stat")) -> float | None:
    """How many cores' time nobody uses, of those that this process may use; None: the system does not say.

    Some containers have a /proc/stat in which no time passes, or in which the cores have other numbers.
    """
    try:
        before = _jiffies(stat)
        time.sleep(_LOOK)
        after = _jiffies(stat)
    except (OSError, ValueError, LookupError):
        return None
    idle = 0.0
    for core in os.sched_getaffinity(0):
        passed = [then - earlier for then, earlier in zip(after.get(core, ()), before.get(core, ()), strict=False)]
        if sum(passed) <= 0:
            return None
        idle += sum(passed[_IDLE]) / sum(passed)
    return min(idle, _usable_cores())


def _jiffies(stat: Path) -> dict[int, list[int]]:
    """Of each core, its time by what it did."""
    lines = [line.split() for line in stat.read_text().splitlines()]
    found = {of[0][3:]: of[1:_KINDS] for of in lines if of[0].startswith("cpu")}
    return {int(core): [int(ticks) for ticks in times] for core, times in found.items() if core}


def threads_for(idle: float | None) -> int | None:
    """On how many threads to compute where others compute too; None: on as many as usual.

    Threads that wait for each other spin, and do little else where they share their cores.
    """
    return max(1, int(idle)) if idle is not None and idle < _BUSY * _usable_cores() else None


def look_at_load(idle: float | None) -> Line:
    """Whether other work takes the cores, so that all that is done here takes longer."""
    if idle is None:
        return Line(PART, "other work", "green", "unknown: /proc/stat does not say how busy the cores are")
    found, figures = f"{idle:.1f} of {_usable_cores():g} cores idle", {"idle": idle}
    if (threads := threads_for(idle)) is None:
        return Line(PART, "other work", "green", found, figures=figures)
    found = f"{found}: everything takes longer, and Vim-Tiny is tried on {counted(threads, 'thread')}"
    fix = "for times of this machine alone, run it again without other work"
    return Line(PART, "other work", "yellow", found, fix, figures)


def look_at_memory(gpus: int) -> Line:
    """What is free, of the machine's or the container's."""
    total, available = memory()
    found = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available"
    figures = {"available": available, "total": total}
    wanted = _MEMORY * max(gpus, 1)
    if available < wanted:
        fix = f"free some, or give the job more: {wanted >> 30} GiB are enough; fewer --num-workers take less"
        return Line(PART, "memory", "yellow", found, fix, figures)
    return Line(PART, "memory", "green", found, figures=figures)


def look_at_shared_memory(gpus: int, folder: Path = Path("/dev/shm")) -> Line:
    """What NCCL exchanges through."""
    fix = "start the container with --shm-size 8g or --ipc host"
    try:
        there = os.statvfs(folder)
    except OSError as error:
        state: State = "red" if gpus > 1 else "yellow"
        return Line(PART, str(folder), state, f"cannot be used ({error.strerror})", fix)
    free = there.f_bavail * there.f_frsize
    found = f"{free / 2**30:.1f} of {there.f_blocks * there.f_frsize / 2**30:.1f} GiB free"
    if gpus > 1 and free < _SHARED:
        return Line(PART, str(folder), "yellow", f"{found}; {gpus} GPUs may need more", fix, {"free": free})
    return Line(PART, str(folder), "green", found, figures={"free": free})


def look_at_open_files() -> Line:
    """How many a process may open, which it may raise to the second limit by itself."""
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    found = f"{soft}, which vimfast may raise to {hard}" if soft != hard else soft
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < _FILES:
        fix = "raise it: ulimit -n, LimitNOFILE of systemd, or --ulimit nofile of docker"
        return Line(
            PART, "open files", "yellow", f"{found}; few, so shards are opened again and again", fix, {"limit": most}
        )
    return Line(PART, "open files", "green", found, figures={"limit": most})


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
