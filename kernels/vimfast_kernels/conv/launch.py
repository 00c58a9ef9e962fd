"""Causal depthwise convolution and SiLU for every direction of a sequence, in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vimfast_kernels.conv.device import conv_backward, conv_forward
from vimfast_kernels.flops import conv_flops, counted
from vimfast_kernels.sums import sum_rows
from vimfast_kernels.tuning import tuning_of


def _meta(
    d: int, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], steps: int, channels: int
) -> dict[str, object]:
    back = sum(1 << k for k, flag in enumerate(reverse) if flag)
    return {
        "D": d, "K": weight.shape[0], "WIDTH": weight.shape[2], "BACK": back, "BIAS": bias is not None,
        "STEPS": steps, "CHANNELS": channels, "num_warps": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def launch_forward(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [k, d, w]; each direction's dense, fastest if channels are neighbours
    bias: Tensor | None,  # [k, d] contiguous
    reverse: Sequence[bool],
) -> Tensor:  # [k, b, L, d]
    b, length, d = x.shape
    out = x.new_empty(weight.shape[0], b, length, d)
    channels, steps, warps = tuning_of(x.device).conv_forward
    meta = _meta(d, weight, bias, reverse, steps, channels) | {"num_warps": warps}
    precise = x.dtype != torch.bfloat16 or not x.is_cuda  # Triton's interpreter knows no tanh.approx
    conv_forward[(triton.cdiv(length, steps), b, triton.cdiv(d, channels))](
        x, weight, x if bias is None else bias, out, length, x.stride(0), x.stride(1), out.stride(0),
        CHANNEL=weight.stride(1), TAP=weight.stride(2), PRECISE=precise, **meta,
    )  # fmt: skip
    return out


def launch_backward(
    dout: Tensor,  # [k, b, L, d]
    x: Tensor,  # [b, L, d]
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    dx: Tensor,  # [b, L, d], written
) -> Tensor:
    """The weights' gradients [rows, k, w + 1, d], fp32, to be summed over the rows: each tap's, and the bias's."""
    b, length, d = x.shape
    k, _, width = weight.shape
    channels, steps, most = tuning_of(x.device).conv_backward
    segments = min(triton.cdiv(length, 4 * steps), most)
    segment = triton.cdiv(triton.cdiv(length, segments), steps) * steps
    partial = x.new_empty(b * segments, k, width + 1, d, dtype=torch.float32)
    conv_backward[(segments, b, triton.cdiv(d, channels))](
        x, weight, x if bias is None else bias, dout, dx, partial, length, segment,
        x.stride(0), x.stride(1), *dout.stride()[:3], dx.stride(0), dx.stride(1),
        **_meta(d, weight, bias, reverse, steps, channels),
    )  # fmt: skip
    return partial


@torch.library.custom_op("vimfast::causal_conv_silu_triton", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    return launch_forward(_rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), reverse)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op("vimfast::causal_conv_silu_triton_backward", mutates_args=())
def _conv_grad(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    contiguous_bias = None if bias is None else bias.contiguous()
    partial = launch_backward(_rows(dout), _rows(x), weight.contiguous(), contiguous_bias, reverse, dx)
    *taps, dbias = sum_rows(partial).to(weight.dtype).unbind(1)
    return dx, torch.stack(taps, -1), dbias.clone()


@_conv_grad.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _conv_grad(dout, x, weight, bias, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None


_conv.register_autograd(_backward, setup_context=_setup_context)
counted(torch.ops.vimfast.causal_conv_silu_triton, conv_flops)
counted(torch.ops.vimfast.causal_conv_silu_triton_backward, conv_flops, skip=1, times=2)


def causal_conv_silu(
    x: Tensor,  # [b, L, d]
    weight: Tensor,  # [k, d, w], one filter for each of the k directions
    bias: Tensor | None = None,  # [k, d]
    *,
    reverse: Sequence[bool] = (False, True),
) -> Tensor:
    """out_{k,t} = silu(bias_k + sum_j weight_{k,j} x_{t-(w-1)+j})  [k, b, L, d]; times t+(w-1)-j where reverse[k].

    bf16, fp16 or fp32 in and out, fp32 inside. x may be a view with any batch and time strides. Deterministic.
    """
    if len(reverse) != weight.shape[0]:
        raise ValueError(f"reverse has {len(reverse)} entries for {weight.shape[0]} directions; give one for each")
    if weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight is for {weight.shape[1]} channels, x has {x.shape[2]}; they must agree")
    out: Tensor = _conv(x, weight, bias, list(reverse))
    return out
