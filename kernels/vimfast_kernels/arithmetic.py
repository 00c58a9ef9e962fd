"""Plain-torch arithmetic that the references of all rooms share."""

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


def empty_gradients(first: Tensor, *rest: Tensor | None) -> list[Tensor]:
    return [
        first.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (first, *rest)
    ]
