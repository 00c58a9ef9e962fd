"""Functions run on several processes that form a gloo group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import forking


def run_on(processes: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on each process; what they return, by rank. `folder` is empty and theirs alone.

    `function` is defined at the top of a module, and what it returns can be loaded with ``weights_only``.
    """
    forking()
    mp.start_processes(_run, (processes, function, folder, arguments), processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(rank: int, processes: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
