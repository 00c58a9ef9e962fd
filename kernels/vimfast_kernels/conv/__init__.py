"""Causal depthwise convolution followed by SiLU, in one direction or in both at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vimfast_kernels.backends import mamba_conv, resolve
from vimfast_kernels.conv import reference


def causal_conv1d_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [d, W]
    bias: Tensor | None = None,  # [d]
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:  # [b, L, d] in x's dtype
    """silu(bias + sum_{lag < W} weight[:, W-1-lag] x_{t-lag}); with ``reverse`` it looks ahead: x_{t+lag}.

    Positions outside the sequence count as zero. fp32 inside. Differentiable in every tensor. A ValueError tells of
    shapes that do not fit and of a backend that cannot run here (see :mod:`vimfast_kernels.backends`).
    """
    _check(x, weight[None], None if bias is None else bias[None], 1)
    chosen = resolve(backend, x)
    if chosen == "mamba_ssm":
        return mamba_conv(x, weight, bias, reverse)
    if chosen == "gluon":
        from vimfast_kernels.conv import launch

        one_bias = None if bias is None else bias[None]
        return launch.causal_conv_silu(x, weight[None], one_bias, reverse=[reverse])[0]
    return reference.conv_silu(x, weight[None], None if bias is None else bias[None], [reverse])[0]


def bidirectional_conv1d_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [2, d, W]
    bias: Tensor | None = None,  # [2, d]
    *,
    backend: str = "auto",
) -> Tensor:  # [2, b, L, d] in x's dtype
    """:func:`causal_conv1d_silu` of one x in both directions, each with its own weight: looking back, looking ahead."""
    _check(x, weight, bias, 2)
    chosen = resolve(backend, x)
    if chosen == "gluon":
        from vimfast_kernels.conv import launch

        return launch.causal_conv_silu(x, weight, bias, reverse=[False, True])
    if chosen == "mamba_ssm":
        return torch.stack(
            [mamba_conv(x, weight[k], None if bias is None else bias[k], reverse=k == 1) for k in (0, 1)]
        )
    return reference.conv_silu(x, weight, bias, [False, True])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, ways: int) -> None:
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (ways, x.shape[2]) or not x.is_floating_point():
        raise ValueError(
            f"causal convolution: x is {x.dtype} {tuple(x.shape)} and weight {tuple(weight.shape[2 - ways :])};"
            f" expected a float [batch, length, channels] and [{'2, ' * (ways == 2)}channels, taps]"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"causal convolution: bias is {tuple(bias.shape)}, expected {tuple(weight.shape[:2])}")
