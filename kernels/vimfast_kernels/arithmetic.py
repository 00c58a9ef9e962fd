"""Plain-torch helpers shared by the references of all ops."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic: fp32, or float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def silu_slope(x: Tensor) -> Tensor:
    """d silu(x) / dx = s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x: autocast's if enabled, else x's."""
    kind = x.device.type
    # torch knows of no autocast on the meta device, and raises when asked.
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def empty_gradients(first: Tensor, *rest: Tensor | None) -> list[Tensor]:
    """Uninitialized memory for the gradient of each tensor; no elements for None."""
    return [
        first.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (first, *rest)
    ]
