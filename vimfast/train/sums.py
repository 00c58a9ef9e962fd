"""Sums that live on the device, and how the host reads them without waiting for the steps after."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vimfast import dist


class Sums:
    """Named running sums on the device, read once for all of them: adding costs no host sync, `read` costs one.

    `read` sums over the processes too.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, *values: Tensor | float) -> None:
        for own, value in zip(self.values, values, strict=True):  # a number goes in with the launch, without a copy
            own += value

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, dist.all_sum(self.values.clone()).tolist(), strict=True))


class Mark:
    """A moment in the work of a device."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come so far."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Mark) -> float:
        """Seconds from one moment to the other, which both have passed."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time - earlier._time


class Reading:
    """Values on their way from the device to the host, as they are now; the device works on meanwhile.

    Every process must read sums at the same place, as they are added up over processes.

    Args:
        sums: float64 [n], of this process; None: there are none.
        others: any numbers that are the same on all processes.
    """

    def __init__(self, sums: Tensor | None, others: Sequence[Tensor]) -> None:
        summed = [] if sums is None else [dist.all_sum(sums.clone())]
        values = torch.cat([*summed, *(other.double().flatten() for other in others)])
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        self.mark = Mark(values.device)

    def get(self) -> list[float]:
        """The sums, then the others, in order; waits until they have arrived."""
        self.mark.wait()
        values: list[float] = self._values.tolist()
        return values
