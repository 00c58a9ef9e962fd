"""Residual add and normalization in one op."""

from __future__ import annotations

from torch import Tensor

from vimfast_kernels import reference
from vimfast_kernels.backends import resolve


def add_rms_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r = residual + x; y = r / sqrt(mean(r^2) + eps) * weight, over the last dimension.

    Returns (y in x's dtype, r in fp32; float64 for float64). Source: Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019.
    """
    if resolve(backend, x) == "gluon":
        from vimfast_kernels import norm_triton

        return norm_triton.add_norm(x, residual, weight, eps=eps)
    return reference.add_rms_norm(x, residual, weight, eps=eps)


def add_layer_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]; None as zeros
    weight: Tensor,  # [c]
    bias: Tensor | None = None,  # [c]
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r = residual + x; y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias, over the last dimension.

    Returns as :func:`add_rms_norm`.
    """
    if resolve(backend, x) == "gluon":
        from vimfast_kernels import norm_triton

        return norm_triton.add_norm(x, residual, weight, bias, eps=eps, rms=False)
    return reference.add_layer_norm(x, residual, weight, bias, eps=eps)
