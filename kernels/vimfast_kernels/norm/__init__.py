"""Residual add and normalization in one op."""

from __future__ import annotations

from torch import Tensor

from vimfast_kernels.backends import AUTO, dispatch
from vimfast_kernels.norm.reference import drop_path

__all__ = ["add_layer_norm", "add_rms_norm", "drop_path"]


def add_rms_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,  # [b], uniform in [0, 1), for stochastic depth
    drop_rate: float = 0.0,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """r = residual + keep x; y = r / sqrt(mean(r^2) + eps) * weight, over the last dimension.

    keep is 1 without noise; with it, for each sample 0 where its noise is below ``drop_rate`` and 1 / (1 - drop_rate)
    where not. Returns (y in x's dtype, r in fp32; float64 for float64). Sources: Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019; Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """
    run = dispatch("norm", backend, x.device, x.dtype)
    out: tuple[Tensor, Tensor] = run(x, residual, weight, None, noise, drop_rate, eps, True)
    return out


def add_layer_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    bias: Tensor | None = None,  # [c]
    *,
    eps: float = 1e-5,
    noise: Tensor | None = None,  # [b], uniform in [0, 1), for stochastic depth
    drop_rate: float = 0.0,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """r = residual + keep x; y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias, over the last dimension.

    keep and what is returned as in :func:`add_rms_norm`.
    """
    run = dispatch("norm", backend, x.device, x.dtype)
    out: tuple[Tensor, Tensor] = run(x, residual, weight, bias, noise, drop_rate, eps, False)
    return out
