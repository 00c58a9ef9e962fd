"""The processes of a run: rank, size and device of this one, and the few collectives that a trainer needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vimfast.affinity import settle
from vimfast.errors import UserError

CONNECT_BYTES = 32 << 20


@dataclass(frozen=True)
class World:
    """This process among those of the run: ``rank`` of ``size``, on its host ``local_rank`` of ``local_size``."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    node: int = 1  # ranks of this host, including this one, that can decode for each other, as Order has it
    host: dist.ProcessGroup | None = None  # those ranks; has a communicator of its own, to run beside the step's

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks() -> tuple[int, int]:
    """The rank of this process and the number of all, in the process group of whoever made one; (0, 1) without one.

    Raises:
        UserError: a launcher started several processes, and they have no group yet.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"WORLD_SIZE is {size}, and these processes have no process group yet: each would see all images",
            "call torch.distributed.init_process_group first",
        )
    return 0, 1


@contextmanager
def processes(device: str, timeout: float = 1800.0) -> Iterator[World]:
    """The process group for the length of the block: closed after it, aborted on an error. Arguments as for `start`."""
    world = start(device, timeout)
    try:
        yield world
    except BaseException:
        abort()  # closing would wait for the others
        raise
    stop()


def start(device: str, timeout: float = 1800.0) -> World:
    """Join the processes that torchrun started (or be the only one) and select a device.

    Args:
        device: ``auto`` (a GPU if there is one), ``cuda``, ``cuda:N`` or ``cpu``.
        timeout: seconds that a collective may take.

    Raises:
        UserError: there is no GPU but one was requested, or there are more processes than GPUs.
    """
    rank, local_rank, size, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    where = _device(device, local_rank, local_size)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        settle(local_rank, [torch.device("cuda", i) for i in range(local_size)] if where.index == local_rank else [])
    if size > 1:
        # NCCL's monitor ends the process without saying why when one of NCCL's own calls takes this long.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(timeout)))
        limit = timedelta(seconds=timeout)
        store = _meeting_point(limit)
        if local_size == size:
            # torchrun restarts processes with the same store, which still holds the addresses of the previous ones.
            # Between hosts the restart count may differ: docs/stopping.md has the setting for that.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=where if where.type == "cuda" else None,
        )
    node, host = _node(rank, local_rank, size, local_size)
    if size > 1 and where.type == "cuda":
        _connect(where, host)
    return World(rank, local_rank, size, local_size, where, node, host)


def _meeting_point(limit: timedelta) -> dist.Store:
    """The store in which the processes find each other.

    Raises:
        UserError: their launcher does not say where, another program has the port, or rank 0 does not answer.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {name} is not set",
                "start the processes with torchrun or --processes, which set both",
            )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store: dist.Store = next(dist.rendezvous("env://", timeout=limit))[0]
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"the processes are to meet at port {port} of {address}, which another program is using",
                "choose another MASTER_PORT (--master_port of torchrun; on one host --standalone finds a free one)",
            ) from None
        why = str(error).splitlines()[0]
        raise UserError(
            f"rank 0 does not answer at {address}, port {port} ({why})",
            "check MASTER_ADDR and MASTER_PORT, firewalls between the hosts, and whether rank 0 is running",
        ) from None
    return store


def _connect(device: torch.device, host: dist.ProcessGroup | None) -> None:
    """Let NCCL connect the GPUs, as it would at the first sum and the first exchange: seconds that others can use.

    It connects again for sums of another size, so this one is as large as a model's.
    """
    dist.all_reduce(torch.zeros(CONNECT_BYTES // 4, device=device))
    if host is not None:
        sent = torch.zeros(host.size(), device=device)
        dist.all_to_all_single(torch.empty_like(sent), sent, group=host)


def _node(rank: int, local_rank: int, size: int, local_size: int) -> tuple[int, dist.ProcessGroup | None]:
    # Asked on every process, whatever its host is like: a collective must not depend on that.
    found = set().union(*gather_objects({(local_size, rank % local_size == local_rank)}))
    if local_size == 1 or found != {(local_size, True)}:
        return 1, None  # hosts with different numbers of processes, or ranks assigned round-robin
    groups = [dist.new_group(list(range(first, first + local_size))) for first in range(0, size, local_size)]
    group = groups[rank // local_size]
    assert isinstance(group, dist.ProcessGroup)
    return local_size, group


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {device!r}; it must be auto, cuda, cuda:N or cpu")
    if where.type == "cpu":
        return where
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if where.index is None else where.index
    if count == 0:
        raise UserError(f"--device is {device!r} but no GPU is visible; check nvidia-smi, or use --device cpu")
    if index >= count or (local_size > 1 and local_size > count):
        visible = f"only {count} GPU{'s are' if count > 1 else ' is'} visible"
        if local_size > count:
            raise UserError(f"{local_size} processes requested but {visible}", f"start at most {count}")
        raise UserError(f"--device is {device!r} but {visible}", "give a lower number, or cuda")
    return torch.device("cuda", index)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def abort() -> None:
    """Abandon what the group is doing: for the end of a process when the others may be gone."""
    give_up = getattr(dist.distributed_c10d, "_abort_process_group", None)  # torch 2.6 and later
    if dist.is_initialized() and dist.get_backend() == "nccl" and give_up is not None:
        give_up()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
