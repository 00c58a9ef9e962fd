"""The causal convolution with SiLU in plain torch: what every faster one is compared with, on any device.

A forward and a hand-derived backward, registered as torch custom ops with shape functions, in fp32 (float64 for
float64 inputs) whatever dtype comes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast_kernels.arithmetic import empty_gradients, silu_slope, wide
from vimfast_kernels.flops import conv_flops, counted

# Causal depthwise convolution and SiLU, for direction k with W taps:
#   out_t = silu(bias + sum_{lag < W} weight[W - 1 - lag] * x_{t - lag})    (t + lag where time runs down)


def _taps(length: int, width: int, reverse: bool) -> Iterator[tuple[int, slice, slice]]:
    """(tap, positions it adds to, positions it reads)."""
    for lag in range(min(width, length)):
        late, early = slice(lag, None), slice(length - lag)
        yield (width - 1 - lag, early, late) if reverse else (width - 1 - lag, late, early)


def _before_silu(x: Tensor, taps: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The convolution of one direction: x [b, L, d], taps [W, d] -> [b, L, d], all of them wide."""
    out = torch.zeros_like(x) if bias is None else wide(bias).expand_as(x).clone()
    for tap, target, source in _taps(x.shape[1], len(taps), reverse):
        out[:, target].addcmul_(x[:, source], taps[tap])
    return out


@torch.library.custom_op(
    "vimfast::conv_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool[] reverse) -> Tensor",
)
def conv_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [k, d, W]
    bias: Tensor | None,  # [k, d]
    reverse: list[bool],  # [k]
) -> Tensor:  # [k, b, L, d] in x's dtype
    out = x.new_empty(len(weight), *x.shape)
    for k, back in enumerate(reverse):
        pre = _before_silu(wide(x), wide(weight[k]).t().contiguous(), None if bias is None else bias[k], back)
        out[k] = F.silu(pre, inplace=True)
    return out


@torch.library.custom_op(
    "vimfast::conv_silu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool[] reverse) -> Tensor[]",
)
def conv_silu_backward(
    grad: Tensor,  # [k, b, L, d]
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias; an empty one for a bias that is None."""
    grads = empty_gradients(x, weight, bias)
    _, dweight, dbias = grads
    dweight.zero_()  # taps beyond a short sequence never act
    x = wide(x)
    dx = torch.zeros_like(x)
    for k, back in enumerate(reverse):
        taps = wide(weight[k]).t().contiguous()
        g = wide(grad[k]) * silu_slope(_before_silu(x, taps, None if bias is None else bias[k], back))
        for tap, target, source in _taps(x.shape[1], len(taps), back):
            dx[:, source].addcmul_(g[:, target], taps[tap])
            dweight[k, :, tap] = (g[:, target] * x[:, source]).sum((0, 1))
        if bias is not None:
            dbias[k] = g.sum((0, 1))
    grads[0].copy_(dx)
    return grads


@conv_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: list[bool]) -> Tensor:
    return x.new_empty(weight.shape[0], *x.shape)


@conv_silu_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return empty_gradients(*inputs[:3])


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = conv_silu_backward(grad, x, weight, bias, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None


conv_silu.register_autograd(_conv_gradients, setup_context=_conv_context)
counted(torch.ops.vimfast.conv_silu, conv_flops)
counted(torch.ops.vimfast.conv_silu_backward, conv_flops, skip=1, times=2)
