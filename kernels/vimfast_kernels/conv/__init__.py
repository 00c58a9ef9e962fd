"""Causal depthwise convolution followed by SiLU, in one direction or in both at once."""

from __future__ import annotations

from torch import Tensor

from vimfast_kernels.backends import AUTO, dispatch


def causal_conv1d_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [d, W]
    bias: Tensor | None = None,  # [d]
    *,
    reverse: bool = False,
    backend: str = AUTO,
) -> Tensor:  # [b, L, d] in x's dtype
    """silu(bias + sum_{lag < W} weight[:, W-1-lag] x_{t-lag}); with ``reverse`` it looks ahead: x_{t+lag}.

    Positions outside the sequence count as zero. fp32 inside. Differentiable in every tensor. Raises ValueError for
    shapes that do not match and for a backend that cannot run here (see :mod:`vimfast_kernels.backends`).
    """
    stacked = weight[None], None if bias is None else bias[None]
    _check(x, *stacked, 1)
    out: Tensor = dispatch("conv", backend, x.device, x.dtype)(x, *stacked, [reverse])
    return out[0]


def bidirectional_conv1d_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [2, d, W]
    bias: Tensor | None = None,  # [2, d]
    *,
    backend: str = AUTO,
) -> Tensor:  # [2, b, L, d] in x's dtype
    """:func:`causal_conv1d_silu` of one x in both directions, each with its own weight: looking back, looking ahead."""
    _check(x, weight, bias, 2)
    out: Tensor = dispatch("conv", backend, x.device, x.dtype)(x, weight, bias, [False, True])
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, ways: int) -> None:
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (ways, x.shape[2]) or not x.is_floating_point():
        raise ValueError(
            f"causal convolution: x is {x.dtype} {tuple(x.shape)} and weight {tuple(weight.shape[2 - ways :])};"
            f" expected a float [batch, length, channels] and [{'2, ' * (ways == 2)}channels, taps]"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"causal convolution: bias is {tuple(bias.shape)}, expected {tuple(weight.shape[:2])}")
