"""Residual add and normalization in one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vimfast_kernels.arithmetic import wide
from vimfast_kernels.backends import resolve
from vimfast_kernels.norm import reference


def add_rms_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,  # [b], uniform in [0, 1), for stochastic depth
    drop_rate: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r = residual + keep x; y = r / sqrt(mean(r^2) + eps) * weight, over the last dimension.

    keep is 1 without noise; with it, for each sample 0 where its noise is below ``drop_rate`` and 1 / (1 - drop_rate)
    where not. Returns (y in x's dtype, r in fp32; float64 for float64). Sources: Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019; Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    if resolve(backend, x) == "gluon":
        from vimfast_kernels.norm import launch

        return launch.add_norm(x, residual, weight, noise=noise, drop_rate=drop_rate, eps=eps)
    return _plain(reference.add_rms_norm, x, residual, noise, drop_rate, weight, eps=eps)


def add_layer_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    bias: Tensor | None = None,  # [c]
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,  # [b], uniform in [0, 1), for stochastic depth
    drop_rate: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r = residual + keep x; y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias, over the last dimension.

    keep and what is returned as in :func:`add_rms_norm`.
    """
    if resolve(backend, x) == "gluon":
        from vimfast_kernels.norm import launch

        return launch.add_norm(x, residual, weight, bias, noise=noise, drop_rate=drop_rate, eps=eps, rms=False)
    return _plain(reference.add_layer_norm, x, residual, noise, drop_rate, weight, bias, eps=eps)


def drop_path(x: Tensor, noise: Tensor | None, drop_rate: float) -> Tensor:
    """keep x [b, ...], keep as in :func:`add_rms_norm`."""
    if noise is None:
        return x
    keep = torch.where(noise < drop_rate, 0.0, 1 / (1 - drop_rate) if drop_rate < 1 else 0.0)
    return x * keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _plain(
    norm: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    residual: Tensor | None,
    noise: Tensor | None,
    drop_rate: float,
    *weights: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    y, total = norm(drop_path(wide(x), noise, drop_rate), residual, *weights, eps=eps)
    return y.to(x.dtype), total
