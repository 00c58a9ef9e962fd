"""Cores for the ranks of a host, by property on made-up machines; sysfs in a folder; a process that settles."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run_forked

from vimfast.affinity import gpu_node, physical, read_cores, read_nodes, settle, share_out

CPUS = [torch.device("cpu")] * 2


class Machine:
    """CPU n and n + sockets * cores are the threads of one core, as Linux numbers them."""

    def __init__(self, sockets: int = 2, cores: int = 32, threads: int = 2) -> None:
        total = sockets * cores
        self.cpus = set(range(total * threads))
        self.core_of = {cpu: cpu % total for cpu in self.cpus}
        self.node_of = {cpu: cpu % total // cores for cpu in self.cpus}

    def node(self, *nodes: int) -> set[int]:
        return {cpu for cpu in self.cpus if self.node_of[cpu] in nodes}

    def share(self, gpu_nodes: Sequence[int | None], cpus: set[int] | None = None) -> list[set[int]]:
        """Shares that were checked for what holds on every machine with a core for each rank."""
        cpus = self.cpus if cpus is None else cpus
        shares = share_out(cpus, self.core_of, self.node_of, gpu_nodes)
        assert len(shares) == len(gpu_nodes)
        assert sum(map(len, shares)) == len(set().union(*shares)), "not disjoint"
        assert set().union(*shares) <= cpus
        for share in shares:
            assert {self.core_of[cpu] for cpu in share}.isdisjoint(self.core_of[cpu] for cpu in cpus - share), "split"
        return shares

    def counts(self, shares: Sequence[set[int]]) -> list[int]:
        return [physical(share, self.core_of) for share in shares]


def even(counts: Sequence[int]) -> bool:
    return max(counts) - min(counts) <= 1


def test_two_sockets_with_four_gpus_each() -> None:
    machine = Machine()
    shares = machine.share([0, 0, 0, 0, 1, 1, 1, 1])
    assert machine.counts(shares) == [8] * 8
    assert set().union(*shares[:4]) == machine.node(0)
    assert set().union(*shares[4:]) == machine.node(1)
    assert shares[1] == {*range(8, 16), *range(72, 80)}  # neighbours, with their siblings


def test_gpus_in_any_order_find_their_nodes() -> None:
    machine = Machine()
    nodes = [1, 0, 0, 1, 1, 0, 1, 0]
    for share, node in zip(machine.share(nodes), nodes, strict=True):
        assert share <= machine.node(node)


@pytest.mark.parametrize("seed", range(100))
def test_any_subset_of_cpus(seed: int) -> None:
    """Containers allow what is left of a machine: single threads of cores, most of one socket, little of the other."""
    draw = random.Random(seed)
    machine = Machine(draw.choice([1, 2, 4]), draw.choice([3, 8, 32]), draw.choice([1, 2]))
    cpus = set(draw.sample(sorted(machine.cpus), draw.randint(1, len(machine.cpus))))
    gpus = [draw.choice([None, -1, 0, 0, 1, 1, 7]) for _ in range(draw.randint(1, 8))]
    if physical(cpus, machine.core_of) < len(gpus):
        assert share_out(cpus, machine.core_of, machine.node_of, gpus) == [cpus] * len(gpus)
        return
    shares = machine.share(gpus, cpus)
    pools: dict[int | None, set[int]] = {node: cpus & machine.node(node) for node in (0, 1) if node in gpus}
    pools = {node: pool for node, pool in pools.items() if pool}
    homes = [gpu if gpu in pools else None for gpu in gpus]
    rest = cpus - set().union(*pools.values())
    ideal = len(cpus) / len(gpus)
    if all(share <= pools.get(home, rest) for share, home in zip(shares, homes, strict=True)):
        assert all(even(machine.counts([s for s, h in zip(shares, homes, strict=True) if h == home])) for home in homes)
        assert min(map(len, shares)) >= ideal / 2 or even(machine.counts(shares))
    else:  # only where some node has too little
        assert even(machine.counts(shares))
        assert set().union(*shares) == cpus
        assert min(len(pools.get(home, rest)) / homes.count(home) for home in homes) < ideal / 2 + 2
    assert all(shares)


@pytest.mark.parametrize("seed", range(30))
def test_single_threads_are_spread(seed: int) -> None:
    draw = random.Random(seed)
    machine = Machine(1, 24)
    cpus = set(draw.sample(sorted(machine.cpus), draw.randint(16, 48)))
    shares = machine.share([0] * draw.randint(2, 8), cpus)
    assert set().union(*shares) == cpus
    assert even(machine.counts(shares))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


@pytest.mark.parametrize("gpus", [[0] * 3, [None] * 3, [-1] * 3, [0, None, 5]])
def test_one_node_is_shared_by_all(gpus: list[int | None]) -> None:
    machine = Machine(1, 16)
    shares = machine.share(gpus)
    assert sorted(machine.counts(shares)) == [5, 5, 6]
    assert set().union(*shares) == machine.cpus


def test_a_gpu_of_an_unknown_node_takes_what_is_left() -> None:
    machine = Machine()
    known, unknown = machine.share([0, None])
    assert (known, unknown) == (machine.node(0), machine.node(1))
    known, *others = machine.share([1, None, 5])  # nor are there CPUs on node 5
    assert known == machine.node(1)
    assert machine.counts(others) == [16, 16]
    assert set().union(*others) == machine.node(0)


def test_nothing_left_for_a_gpu_of_an_unknown_node() -> None:
    machine = Machine()
    shares = machine.share([0, 1, None, 0])
    assert machine.counts(shares) == [16] * 4
    assert shares[0] | shares[3] == machine.node(0)  # even, and still near where that costs nothing


def test_far_less_than_an_even_share_is_refused() -> None:
    machine = Machine()
    cpus = machine.node(0) | {32, 33, 96, 97}
    shares = machine.share([1, 1, 0, 0], cpus)
    assert sorted(machine.counts(shares)) == [8, 8, 9, 9]
    assert set().union(*shares) == cpus
    assert shares[2] | shares[3] <= machine.node(0)
    assert {32, 33, 96, 97} <= shares[0] | shares[1]


def test_an_even_split_keeps_near_where_nodes_alternate() -> None:
    """Some firmware numbers the cores of two sockets in turn."""
    shares = share_out(set(range(16)), {}, {cpu: cpu % 2 for cpu in range(16)}, [1, 0, None, 0])
    assert shares == [{1, 3, 5, 7}, {0, 2, 4, 6}, {9, 11, 13, 15}, {8, 10, 12, 14}]


def test_half_of_an_even_share_is_enough_to_be_near() -> None:
    machine = Machine()
    shares = machine.share([0] * 4)
    assert machine.counts(shares) == [8] * 4
    assert set().union(*shares) == machine.node(0)


def test_fewer_cores_than_ranks() -> None:
    machine = Machine(1, 3)
    assert share_out(machine.cpus, machine.core_of, machine.node_of, [0] * 4) == [machine.cpus] * 4
    assert machine.counts(machine.share([0] * 3)) == [1, 1, 1]


def test_a_machine_that_reports_nothing() -> None:
    assert share_out({4, 5, 6, 9}, {}, {}, [0, 1]) == [{4, 5}, {6, 9}]
    assert share_out({4, 5}, {}, {}, []) == []
    assert share_out(set(), {}, {}, [0]) == [set()]


def test_physical_cores() -> None:
    machine = Machine(1, 4)
    assert physical(machine.cpus, machine.core_of) == 4
    assert physical({0, 1, 4}, machine.core_of) == 2
    assert physical({0, 9, 10}, machine.core_of) == 3
    assert physical((), {}) == 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize("name", ["thread_siblings_list", "core_cpus_list"])
def test_cores_from_sysfs(tmp_path: Path, name: str) -> None:
    for cpu in range(8):
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/{name}", f"{cpu % 4},{cpu % 4 + 4}")
    assert read_cores(range(8), tmp_path) == {cpu: cpu % 4 for cpu in range(8)}
    write(tmp_path / f"devices/system/cpu/cpu1/topology/{name}", "0-1")
    write(tmp_path / f"devices/system/cpu/cpu2/topology/{name}", "nonsense")
    write(tmp_path / f"devices/system/cpu/cpu3/topology/{name}", "0-1")  # others' siblings
    assert read_cores({1, 2, 3, 99}, tmp_path) == {1: 0, 2: 2, 3: 3, 99: 99}


def test_nodes_from_sysfs(tmp_path: Path) -> None:
    nodes = tmp_path / "devices/system/node"
    assert read_nodes(tmp_path) == {}
    write(nodes / "node0/cpulist", "0-2,8-9")
    write(nodes / "node10/cpulist", "3")
    write(nodes / "node2/cpulist", "")  # memory only
    write(nodes / "nodeless/cpulist", "5")
    write(nodes / "online", "0,2,10")
    assert read_nodes(tmp_path) == {0: 0, 1: 0, 2: 0, 8: 0, 9: 0, 3: 10}


def test_a_gpus_node_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buses = (0x1B, 0xC3, 0x5D, 0x9B)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda device: SimpleNamespace(pci_domain_id=0, pci_bus_id=buses[device.index], pci_device_id=0),
    )
    for bus, node in zip(buses, ("0", "1", "-1"), strict=False):
        write(tmp_path / f"bus/pci/devices/0000:{bus:02x}:00.0/numa_node", node)
    assert [gpu_node(torch.device("cuda", i), tmp_path) for i in range(4)] == [0, 1, None, None]
    assert gpu_node(torch.device("cuda"), tmp_path) is None
    assert gpu_node(torch.device("cpu"), tmp_path) is None
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(name="of an older torch"))
    assert gpu_node(torch.device("cuda", 0), tmp_path) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_cannot_be_asked(tmp_path: Path) -> None:
    assert gpu_node(torch.device("cuda", 0), tmp_path) is None


def test_ranks_take_the_cpus_of_their_gpus_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything together: GPU 0 on node 1, GPU 1 on node 0, and two threads per core."""
    for cpu in range(8):
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/core_cpus_list", f"{cpu % 4},{cpu % 4 + 4}")
    for node in range(2):
        write(tmp_path / f"devices/system/node/node{node}/cpulist", f"{2 * node}-{2 * node + 1},{2 * node + 4}")
        write(tmp_path / f"bus/pci/devices/0001:0{node}:02.0/numa_node", str(1 - node))
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda device: SimpleNamespace(pci_domain_id=1, pci_bus_id=device.index, pci_device_id=2),
    )
    taken: list[set[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cpus: taken.append(cpus))
    gpus = [torch.device("cuda", i) for i in range(2)]
    assert [settle(rank, gpus, tmp_path) for rank in range(2)] == taken == [{2, 3, 6, 7}, {0, 1, 4, 5}]
    assert settle(0, gpus[:1], tmp_path) is None
    assert len(taken) == 2


def test_a_system_that_forbids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("os.sched_setaffinity", refuse)
    assert settle(0, CPUS, tmp_path) is None


def test_a_process_that_its_launcher_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[int]] = []
    parents = {0, 1, 2, 3}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: parents if pid == os.getppid() else {0, 1})
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cpus: taken.append(cpus))
    assert settle(0, CPUS, tmp_path) is None
    assert taken == []
    parents = {0, 1}
    assert settle(0, CPUS, tmp_path) == {0}


def show_settling(rank: int, ranks: int, root: Path, *own: int) -> None:
    """Print what `settle` returns, and the CPUs of the process and of a thread that is made afterwards."""
    if own:
        os.sched_setaffinity(0, own)
    print(settle(rank, [torch.device("cpu")] * ranks, root))
    print(os.sched_getaffinity(0))
    later = threading.Thread(target=lambda: print(os.sched_getaffinity(0)))
    later.start()
    later.join()


def settled(rank: int, ranks: int, root: Path, *own: int) -> list[str]:
    done = run_forked(show_settling, rank, ranks, root, *own)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_processes_settle(tmp_path: Path) -> None:
    cpus = os.sched_getaffinity(0)
    for rank, share in enumerate(share_out(cpus, {}, {}, [None, None])):
        assert settled(rank, 2, tmp_path) == [str(share)] * 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_processes_that_stay_as_they_are(tmp_path: Path) -> None:
    cpus = os.sched_getaffinity(0)
    assert settled(0, 1, tmp_path) == ["None", str(cpus), str(cpus)]
    assert settled(0, len(cpus) + 1, tmp_path) == ["None", str(cpus), str(cpus)]
    own = min(cpus)
    assert settled(0, 2, tmp_path, own) == ["None", str({own}), str({own})]
