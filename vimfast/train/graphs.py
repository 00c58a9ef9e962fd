"""What the CUDA graphs of a run have in common: the stream of their capture, and the host's lead."""

from __future__ import annotations

import functools
from collections import deque

import torch

IN_FLIGHT = 2  # steps the host may be ahead of the GPU

Pool = torch.cuda._POOL_HANDLE  # names the memory of CUDA graphs


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everything is captured: graphs share memory only with graphs of their own stream."""
    return torch.cuda.Stream(device)


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
