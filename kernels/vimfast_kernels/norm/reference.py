"""Residual addition and norms in plain torch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast_kernels.arithmetic import wide


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """r = residual + x; y = r / sqrt(mean(r^2) + eps) * weight, over the last dimension.

    x [..., d] of any float dtype, residual [..., d] fp32 or None (as zeros), weight [d]. Returns (y in x's dtype,
    r in fp32).
    """
    total = wide(x) if residual is None else wide(residual) + x
    return F.rms_norm(total, weight.shape, weight.to(total.dtype), eps).to(x.dtype), total


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """r = residual + x; y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias, over the last dimension.

    x [..., d] of any float dtype, residual [..., d] fp32 or None (as zeros), weight and bias [d]. Returns (y in x's
    dtype, r in fp32).
    """
    total = wide(x) if residual is None else wide(residual) + x
    bias = None if bias is None else bias.to(total.dtype)
    return F.layer_norm(total, weight.shape, weight.to(total.dtype), bias, eps).to(x.dtype), total


def drop_path(x: Tensor, noise: Tensor | None, drop_rate: float) -> Tensor:
    """keep x [b, ...], keep as in :func:`vimfast_kernels.add_rms_norm`."""
    if noise is None:
        return x
    keep = torch.where(noise < drop_rate, 0.0, 1 / (1 - drop_rate) if drop_rate < 1 else 0.0)
    return x * keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def add_norm(
    x: Tensor,  # [b, ..., c]
    residual: Tensor | None,  # [b, ..., c]
    weight: Tensor,  # [c]
    bias: Tensor | None,  # [c]
    noise: Tensor | None,  # [b]
    drop_rate: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`vimfast_kernels.add_rms_norm` or, if not ``rms``, :func:`vimfast_kernels.add_layer_norm`."""
    kept = drop_path(wide(x), noise, drop_rate)
    if rms:
        y, total = add_rms_norm(kept, residual, weight, eps=eps)
    else:
        y, total = add_layer_norm(kept, residual, weight, bias, eps=eps)
    return y.to(x.dtype), total
