"""Causal depthwise convolution and SiLU for every direction of a sequence, in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from vimfast_kernels.conv.device import conv_backward, conv_forward
from vimfast_kernels.conv.device_backward import AT_ONCE, HELD_RANK, SEQUENCES, STEPS, conv_backward_of_sum
from vimfast_kernels.flops import conv_flops, counted
from vimfast_kernels.product.launch import multiply
from vimfast_kernels.sums import sum_rows
from vimfast_kernels.tuning import multiprocessors, shared_memory, tuning_of

# Of the kernel that adds a product itself: 168 registers let 3 programs of 4 warps reside on a multiprocessor.
RESIDENT, REGISTERS = 3, 168
RESERVED = 1024  # bytes of shared memory that each program takes besides its own
MOST_STAGES = 3  # blocks of rows in shared memory: the one that is worked on, and those on their way
WIDEST_FILTER = 5  # whose halo on both sides fits into a block of 8 steps
WIDEST_FACTORS = 128  # columns, by the shared memory for their rows


def _backward_directions(reverse: Sequence[bool]) -> int:
    """A bit for each direction in which time runs down."""
    return sum(1 << k for k, flag in enumerate(reverse) if flag)


def _meta(
    d: int, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool], steps: int, channels: int
) -> dict[str, object]:
    return {
        "D": d, "K": weight.shape[0], "WIDTH": weight.shape[2], "BACK": _backward_directions(reverse),
        "BIAS": bias is not None, "STEPS": steps, "CHANNELS": channels, "num_warps": 1, "enable_fp_fusion": True,
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
    # A few long sequences are cut into more segments, for 8 warps a multiprocessor.
    fill = 8 * multiprocessors(x.device) // (b * triton.cdiv(d, channels))
    segments = min(triton.cdiv(length, 4 * steps), max(most, fill))
    segment = triton.cdiv(triton.cdiv(length, segments), steps) * steps
    partial = x.new_empty(b * segments, k, width + 1, d, dtype=torch.float32)
    conv_backward[(segments, b, triton.cdiv(d, channels))](
        x, weight, x if bias is None else bias, dout, dx, partial, length, segment,
        x.stride(0), x.stride(1), *dout.stride()[:3], dx.stride(0), dx.stride(1),
        **_meta(d, weight, bias, reverse, steps, channels),
    )  # fmt: skip
    return partial


def _stages(x: Tensor, k: int, rank: int, channels: int) -> int:
    """As many as let RESIDENT programs share a multiprocessor's memory, and 2 at least."""
    parts = triton.cdiv(rank, 16)
    whole, rest = divmod(parts, AT_ONCE.value)
    slots = whole * AT_ONCE.value + (triton.next_power_of_2(rest) if rest else 0)
    row = (1 + k) * channels + k * 16 * slots
    stage = row * STEPS.value * SEQUENCES.value * x.element_size()
    weights = k * parts * 16 * channels * x.element_size() if rank > HELD_RANK.value else 0
    room = shared_memory(x.device) // RESIDENT - RESERVED - weights
    return max(2, min(MOST_STAGES, int(room // stage)))


def launch_backward_of_sum(
    dout: Tensor,  # [k, b, L, d], may be overwritten
    factors: Tensor,  # [k, b, L, p], rows aligned to 16 bytes
    products: Tensor,  # [k, p, d] contiguous
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    dx: Tensor,
) -> Tensor:
    """`launch_backward` for the gradient dout + factors products, which is not written where the kernel that makes
    it takes the shapes."""
    (b, length, d), (k, _, width), rank = x.shape, weight.shape, products.shape[1]
    if x.element_size() > 2 or k > 2 or width > WIDEST_FILTER or rank > WIDEST_FACTORS or d % 16:
        flat = dout.view(k, b * length, d)
        multiply(factors.view(k, b * length, -1), products, out=flat, add=True)
        return launch_backward(dout, x, weight, bias, reverse, dx)
    channels = math.gcd(d, 64)
    programs = triton.cdiv(b, SEQUENCES.value) * (d // channels)
    segments = RESIDENT * multiprocessors(x.device) // programs
    segments = max(1, min(segments, length // (4 * STEPS.value)))
    segment = triton.cdiv(triton.cdiv(length, segments), STEPS.value) * STEPS.value
    segments = triton.cdiv(length, segment)
    partial = x.new_empty(b * segments, k, width + 1, d, dtype=torch.float32)
    conv_backward_of_sum[(segments, triton.cdiv(b, SEQUENCES.value), d // channels)](
        x, weight, x if bias is None else bias, dout, factors, products, dx, partial, b, length, segment,
        x.stride(0), *dout.stride()[:2], *factors.stride()[:2], dx.stride(0),
        X_TIME=x.stride(1), DOUT_TIME=dout.stride(2), FACTOR_TIME=factors.stride(2), DX_TIME=dx.stride(1),
        D=d, K=k, WIDTH=width, BACK=_backward_directions(reverse), BIAS=bias is not None,
        RANK=rank, CHANNELS=channels, STAGES=_stages(x, k, rank, channels), PRECISE=x.dtype != torch.bfloat16,
        num_warps=channels // 16, maxnreg=REGISTERS, enable_fp_fusion=True,
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
