"""What CUDA graphs have in common: the stream of their capture, the capture itself, and the host's lead."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

IN_FLIGHT = 2  # steps the host may be ahead of the GPU

Result = TypeVar("Result")
Pool = torch.cuda._POOL_HANDLE  # names the memory of CUDA graphs


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everything is captured: graphs share memory only with graphs of their own stream."""
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Work on the side stream, before a capture: after all that the current stream was given, which waits for it."""
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(side)


def record(
    work: Callable[[], Result], device: torch.device, *, pool: Pool | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """What `work` launches, as a graph, and what it returned, into which each replay computes.

    Nothing is computed yet. Other threads may use the GPU meanwhile.

    Args:
        work: has run :func:`aside` before, so that kernels are compiled and libraries have their handles.
        pool: memory of other graphs that never run beside this one; None: memory of its own.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side_stream(device), capture_error_mode="thread_local"):
        result = work()
    return graph, result


class Lead:
    """Lets the host be no more than :data:`IN_FLIGHT` steps ahead: those in flight hold memory, and signals must be
    heard."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def mark(self) -> torch.cuda.Event | None:
        """After a step was queued on the current stream; returns its end, with timing. None: this is no GPU."""
        if self._device.type != "cuda":
            return None
        end = torch.cuda.Event(enable_timing=True)
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        if len(self._ends) > IN_FLIGHT:
            self._ends.popleft().synchronize()
        return end
