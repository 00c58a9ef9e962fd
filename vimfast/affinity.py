"""Cores for each process of a host: whole cores of its own, near its GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

_SYS = Path("/sys")
_NOWHERE = 1 << 30  # sorts after every known node


def settle(local_rank: int, devices: Sequence[torch.device], root: Path = _SYS) -> set[int] | None:
    """Restrict this process to cores that it shares with no other rank of its host.

    Threads inherit this from the thread that creates them, and existing threads keep all cores, so call it early.

    Args:
        devices: of all local ranks, the same on each.
        root: where sysfs is mounted.

    Returns:
        The logical CPUs of this process, or None if nothing was changed: there is a single rank, there are fewer cores
        than ranks, the launcher already gave this process fewer CPUs than its own, or the system does not allow it.
    """
    if len(devices) < 2:
        return None
    try:
        cpus = os.sched_getaffinity(0)
        if cpus < os.sched_getaffinity(os.getppid()):  # pinned by its launcher, or settled before
            return None
        nodes = [gpu_node(device, root) for device in devices]
        share = share_out(cpus, read_cores(cpus, root), read_nodes(root), nodes)[local_rank]
        if share == cpus:
            return None
        os.sched_setaffinity(0, share)
    except OSError:
        return None
    return share


def share_out(
    cpus: set[int], core_of: Mapping[int, object], node_of: Mapping[int, int], gpu_nodes: Sequence[int | None]
) -> list[set[int]]:
    """Logical CPUs for each rank: disjoint, whole physical cores, as evenly as the nodes allow.

    Ranks whose GPUs are on the same NUMA node share its cores; the others share the cores of nodes without a GPU. If
    that would leave any rank less than half of an even share, all cores are shared evenly, and the nodes only decide
    which rank gets which. With fewer cores than ranks, every rank keeps all CPUs.

    Args:
        cpus: those allowed.
        core_of: the physical core of each; a CPU that is missing is a core of its own.
        node_of: the NUMA node of each, where known.
        gpu_nodes: the NUMA node of each rank's GPU; None or -1 where unknown.
    """
    ranks = len(gpu_nodes)
    cores = _siblings(cpus, core_of)
    if not 0 < ranks <= len(cores):
        return [set(cpus) for _ in gpu_nodes]
    near = {core[0]: _sortable(node_of.get(core[0])) for core in cores}
    cores.sort(key=lambda core: (near[core[0]], core[0]))
    wanted = [_sortable(node) for node in gpu_nodes]

    shares: list[set[int]] = [set() for _ in gpu_nodes]
    shared = (set(wanted) & set(near.values())) - {_NOWHERE}
    for node in (*shared, _NOWHERE):
        sharers = [rank for rank in range(ranks) if (wanted[rank] if wanted[rank] in shared else _NOWHERE) == node]
        pool = [core for core in cores if (near[core[0]] if near[core[0]] in shared else _NOWHERE) == node]
        for rank, share in zip(sharers, _deal(pool, len(sharers)), strict=True):
            shares[rank] = share
    if 2 * ranks * min(map(len, shares)) < len(cpus):
        by_node = sorted(range(ranks), key=lambda rank: (wanted[rank], rank))
        for rank, share in zip(by_node, _deal(cores, ranks), strict=True):
            shares[rank] = share
    return shares


def physical(cpus: Iterable[int], core_of: Mapping[int, object]) -> int:
    """How many physical cores these logical CPUs are on: two hyper-threads of one core count once."""
    return len(_siblings(cpus, core_of))


def _siblings(cpus: Iterable[int], core_of: Mapping[int, object]) -> list[list[int]]:
    """The given CPUs of each physical core, in order."""
    cores: dict[object, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(("core", core_of[cpu]) if cpu in core_of else ("cpu", cpu), []).append(cpu)
    return list(cores.values())


def _sortable(node: int | None) -> int:
    return _NOWHERE if node is None or node < 0 else node


def _deal(cores: list[list[int]], ranks: int) -> list[set[int]]:
    """Neighbouring cores for each rank, as neighbours share caches; the ranks' numbers of cores differ by at most 1.

    A container may allow both threads of one core but only one of another, so cores are dealt out by size, and those
    left over go to the ranks that have the fewest.
    """
    shares: list[set[int]] = [set() for _ in range(ranks)]
    if not ranks:
        return shares
    have = [0] * ranks
    for size in sorted({len(core) for core in cores}, reverse=True):
        alike = [core for core in cores if len(core) == size]
        each, over = divmod(len(alike), ranks)
        least = sorted(range(ranks), key=lambda rank: (have[rank], len(shares[rank]), rank))[:over]
        rest = iter(alike)
        for rank, share in enumerate(shares):
            mine = each + (rank in least)
            have[rank] += mine
            share.update(*islice(rest, mine))
    return shares


def read_cores(cpus: Iterable[int], root: Path = _SYS) -> dict[int, int]:
    """The physical core of each CPU, named after its first thread; without sysfs each CPU is its own core."""
    found = {}
    for cpu in cpus:
        folder = root / f"devices/system/cpu/cpu{cpu}/topology"
        siblings = _cpu_list(folder / "core_cpus_list") or _cpu_list(folder / "thread_siblings_list")  # older name
        found[cpu] = min(siblings) if cpu in siblings else cpu
    return found


def read_nodes(root: Path = _SYS) -> dict[int, int]:
    """The NUMA node of each CPU of the machine; empty without sysfs."""
    found = {}
    for path in sorted(root.glob("devices/system/node/node*/cpulist")):
        number = path.parent.name.removeprefix("node")
        if number.isdecimal():
            found.update(dict.fromkeys(_cpu_list(path), int(number)))
    return found


def gpu_node(device: torch.device, root: Path = _SYS) -> int | None:
    """The NUMA node that a GPU is on; None if that is unknown or the device is not a GPU."""
    if device.type != "cuda" or device.index is None:  # without an index, it is a different GPU on each rank
        return None
    try:
        gpu: Any = torch.cuda.get_device_properties(device)
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
    # Older versions of torch do not have the address; those without CUDA raise AssertionError.
    except (AttributeError, AssertionError, RuntimeError, OSError, ValueError):
        return None
    return node if node >= 0 else None


def _cpu_list(path: Path) -> set[int]:
    """The CPUs in a file such as ``0-3,64-67``; none if it cannot be read."""
    cpus: set[int] = set()
    try:
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return set()
    return cpus
