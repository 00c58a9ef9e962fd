"""torch's random states, which are part of a place in a run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RandomStates(NamedTuple):
    """In host memory. Stochastic depth draws from them in each step."""

    cpu: Tensor
    cuda: Tensor | None


def random_states(device: torch.device) -> RandomStates:
    """As they are; a GPU's if `device` is one."""
    return RandomStates(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def set_random_states(states: RandomStates, device: torch.device) -> None:
    """Those of a GPU only where there is one."""
    torch.set_rng_state(states.cpu)
    if states.cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states.cuda, device)
