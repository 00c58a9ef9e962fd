"""The search for the largest batch that there is memory for. It only calls a trial; a caller says what that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vimfast.errors import lacks_memory
from vimfast.image_size import ImageSize
from vimfast.train.losses import Objective
from vimfast.train.mixing import Mixup

Trial = Callable[[int], None]  # does what a step of so many images takes; raises where memory is too little

_UNIT = 8  # images: what matrix units like
_FINENESS = 16  # the search ends within this share of the batch


def largest_batch(trial: Trial, most: int, unit: int = _UNIT) -> int:
    """The largest multiple of `unit`, up to `most`, that a trial has memory for, to within a sixteenth; of fewer than
    `unit` images, any number. 0: not even one fits.

    A batch that fits is doubled until one does not; what lies between is halved.
    """
    if most < unit:
        unit = 1
    good, bad, size = 0, most + 1, unit
    while good < most and size < bad:
        if _fits(trial, size):
            good, size = size, min(2 * size, most // unit * unit)
            if good == size:
                break
        else:
            bad = size
    while bad - good > max(unit, good // _FINENESS):
        middle = (good + bad) // 2 // unit * unit
        if middle <= good:
            break
        good, bad = (middle, bad) if _fits(trial, middle) else (good, middle)
    if good == 0 and unit > 1:
        return largest_batch(trial, unit - 1, 1)
    return good


def _fits(trial: Trial, size: int) -> bool:
    try:
        trial(size)
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            return False
        raise
    return True


def blank_batch(
    device: torch.device, batch: int, size: ImageSize, mixup: Mixup, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Images and targets of the shapes that a step has."""
    images = torch.zeros(batch, 3, *size, device=device)
    images, targets = mixup(images, torch.zeros(batch, dtype=torch.int64, device=device), 0)
    return objective.prepare(images), targets
